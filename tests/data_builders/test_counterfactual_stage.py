import json
import subprocess
import sys
import tracemalloc
from collections import Counter

import pytest

from biasunlearn_trainer.data_builders.counterfactual import Counterfactuals, words_version
from biasunlearn_trainer.data_builders.counterfactual.stage import POLARITIES
from biasunlearn_trainer.data_builders.schema import POLARITIES as OF_SCHEMA
from biasunlearn_trainer.data_builders.schema import Faults, check_rows
from biasunlearn_trainer.data_builders.stages import Reject, run_stages


def row(completion, prompt="", **columns):
    return {"prompt": prompt, "completion": completion, **columns}


def run(rows, tmp_path, *, rejects=None, **options):
    return list(run_stages(rows, [Counterfactuals(**options)], tmp_path, ([] if rejects is None else rejects).append))


class TestPairs:
    def test_a_stereotype_and_its_counterfactual(self, tmp_path):
        given = row("Women are bad at parking.", bias_type="gender", polarity="stereotype", source="own", source_id="7")
        first, other = run([given], tmp_path)
        assert first == {
            **given,
            "pair_id": first["pair_id"],
            "demographic": "female",
            "counterfactual": False,
        }
        assert other == {
            "prompt": "",
            "completion": "Men are bad at parking.",
            "bias_type": "gender",
            "polarity": "anti_stereotype",
            "pair_id": first["pair_id"],
            "source": "own",
            "source_id": "7",
            "demographic": "male",
            "counterfactual": True,
            "rejected": "Women are bad at parking.",
        }

    def test_what_is_rejected_answers_the_same_prompt(self, tmp_path):
        one = row(" She did.", "Who was late?", polarity="stereotype", kind="ambiguous", fact="hers")
        two = row(" She did.", "Was she late?", polarity="stereotype")
        three = row(" She did.", "Who was late?", polarity="anti_stereotype", rejected=" He did.")
        rows = run([one, two, three], tmp_path, bias_types=["gender"])
        assert [r.get("rejected") for r in rows] == [None, " She did.", None, None, " He did.", None]
        assert [r.get("kind") for r in rows[:2]] == ["ambiguous", "ambiguous"]
        assert "fact" in rows[0] and "fact" not in rows[1]

    def test_what_a_row_lacks_is_filled_in(self, tmp_path):
        rows = run([row("It rained."), row("She left.")], tmp_path)
        assert [(r["source"], r["source_id"], r["polarity"], r["bias_type"]) for r in rows] == [
            ("text", "2", "neutral", "gender")
        ] * 2
        assert {r["polarity"] for r in run([row("She left.")], tmp_path, polarity="stereotype")} == {
            "stereotype",
            "anti_stereotype",
        }

    def test_a_row_without_type_gives_a_pair_for_each_that_it_has(self, tmp_path):
        rows = run([row("The old Muslim woman left.", bias_type=given) for given in (None, "other")], tmp_path)
        assert [r["bias_type"] for r in rows] == ["age", "age", "gender", "gender", "religion", "religion"] * 2
        assert len({r["pair_id"] for r in rows}) == 3

    def test_grammar_crosses_from_prompt_to_completion(self, tmp_path):
        _, other = run([row(" keys on the bus.", "My aunt lost her", bias_type="gender")], tmp_path)
        assert (other["prompt"], other["completion"]) == ("My uncle lost his", " keys on the bus.")
        rejects = []
        assert not run([row("man left.", "The wo", bias_type="gender")], tmp_path, rejects=rejects)
        assert rejects[0].reason == "not_reversible"

    def test_chat_messages(self, tmp_path):
        given = {
            "prompt": [{"role": "user", "content": "Who is she?"}, {"role": "user", "content": "An aunt?"}],
            "completion": [{"role": "assistant", "content": "His daughter."}],
        }
        _, other = run([given], tmp_path, bias_types=["gender"])
        assert other["prompt"] == [{"role": "user", "content": "Who is he?"}, {"role": "user", "content": "An uncle?"}]
        assert other["completion"] == [{"role": "assistant", "content": "Her son."}]

    def test_columns_that_speak_of_the_other_people_stay_with_the_row(self, tmp_path):
        given = row("She left.", bias_type="gender", rejected="She stayed.", group="own:1")
        first, other = run([given], tmp_path)
        assert first["rejected"] == "She stayed." and "rejected" not in other
        assert other["group"] == "own:1"

    def test_rows_pass_the_schema(self, tmp_path):
        rows = run([row("She left."), row("A Muslim prayed."), row("The blind man smiled.")], tmp_path)
        faults = Faults("rows")
        assert check_rows(((f"row {i}", r) for i, r in enumerate(rows, 1)), faults) == 8
        assert not faults.texts
        assert POLARITIES == OF_SCHEMA


class TestRejects:
    @pytest.mark.parametrize(
        ("given", "reason"),
        [
            (row("He called her fat.", bias_type="gender"), "ambiguous_her"),
            (row("It rained.", bias_type="gender"), "no_term"),
            (row("It rained."), "no_term"),
            # Of several types the reason is that of a word which was there.
            (row("He called her fat."), "ambiguous_her"),
            (row("She left.", bias_type="planets"), "other_bias_type"),
            (row("She left.", images=["a.png"]), "picture"),
            (row([{"role": "assistant", "content": [{"type": "text", "text": "She left."}]}], []), "no_plain_text"),
        ],
    )
    def test_reasons(self, given, reason, tmp_path):
        rejects = []
        assert not run([given], tmp_path, rejects=rejects)
        (reject,) = rejects
        assert isinstance(reject, Reject) and reject.reason == reason and reject.row == given
        assert reject.detail and reject.stage == "counterfactual"

    def test_options_are_checked(self):
        with pytest.raises(ValueError, match="No word pairs for bias type 'genre'"):
            Counterfactuals(["genre"])
        with pytest.raises(ValueError, match="gender has no group 'jedi'"):
            Counterfactuals(["gender"], to="jedi")
        with pytest.raises(ValueError, match="group of one bias type"):
            Counterfactuals(to="muslim")
        with pytest.raises(ValueError, match="unknown polarity 'bad'"):
            Counterfactuals(polarity="bad")


class TestBalance:
    def test_groups_are_balanced_where_there_are_several(self, tmp_path):
        rows = run([row(f"A Muslim person left {n} times.", bias_type="religion") for n in range(50)], tmp_path)
        counts = Counter(r["demographic"] for r in rows)
        assert counts.pop("muslim") == 50
        assert counts == {"christian": 10, "jewish": 10, "hindu": 10, "buddhist": 10, "sikh": 10}

    def test_two_groups_are_balanced_however_the_rows_are(self, tmp_path):
        stage = Counterfactuals()
        list(run_stages([row("She left.")] * 9 + [row("He left.")], [stage], tmp_path, lambda reject: None))
        assert stage.counts == {("gender", "female"): 10, ("gender", "male"): 10}

    def test_a_group_may_be_asked_for(self, tmp_path):
        rows = run([row("A Muslim person left.")] * 3, tmp_path, bias_types=["religion"], to="sikh")
        assert [r["completion"] for r in rows[1::2]] == ["A Sikh person left."] * 3

    def test_a_second_run_gives_the_same(self, tmp_path):
        stage, given = Counterfactuals(), [row("A Muslim left."), row("A Hindu person left."), row("She left.")]
        assert list(stage.run(given)) == list(stage.run(given))


class TestSize:
    def test_rows_are_yielded_as_they_come(self):
        taken = []
        rows = (taken.append(n) or row("She left.") for n in range(100))
        next(Counterfactuals(["gender"]).run(rows))
        assert taken == [0]

    def test_memory_does_not_grow_with_the_rows(self):
        def peak(num_rows):
            rows = (row(f"She left her house {n} times.", bias_type="gender") for n in range(num_rows))
            tracemalloc.start()
            for _ in Counterfactuals().run(rows):
                pass
            _, most = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            return most

        peak(100)
        assert peak(2000) < 1.2 * peak(500)


def test_settings_are_json_and_name_the_words():
    assert json.loads(json.dumps(Counterfactuals().settings))["words"] == words_version()


def test_the_command_runs_from_a_shell():
    command = [sys.executable, "-m", "biasunlearn_trainer.data_builders.counterfactual", "-", "--bias_type", "gender"]
    done = subprocess.run(command, input="The nurse said her shift was over.\n", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("  gender, female -> male: The nurse said his shift was over.\n")
