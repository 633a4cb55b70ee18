"""Verdicts on results made up by hand, and item-by-item changes against worked numbers."""

import math

import numpy as np
import pytest

from biasunlearn_trainer.eval.compare import compare, outcome, verdicts
from biasunlearn_trainer.eval.findings import combined, deciding_tasks, distance, judge, judge_groups, scale_of


def share(value, n=100, half=0.05, higher=True, ideal=1.0):
    ends = [max(0.0, value - half), min(1.0, value + half)]
    return {"value": value, "n": n, "ci95": ends, "higher_is_better": higher, "ideal": ideal}


def percent(value, half=2.0, n=800, higher=None, ideal=50.0):
    return {"value": value, "n": n, "ci95": [value - half, value + half], "higher_is_better": higher, "ideal": ideal}


def results(**states):
    """Results of one task "world": {"before": {metric: entry}, ...}, or (metrics, groups)."""
    made = {}
    for state, content in states.items():
        metrics, groups = content if isinstance(content, tuple) else (content, {})
        made[state] = {"schema_version": 1, "model": "", "tasks": {"world": {"metrics": metrics, "groups": groups}}}
    return made


def status(metric, before, after, oracle=None):
    states = {"before": before, "after": after, "oracle": oracle}
    made = results(**{state: {metric: entry} for state, entry in states.items() if entry})
    (finding,) = judge(made)
    return finding.status


@pytest.mark.parametrize(
    "before, after, oracle, expected",
    [
        (share(0.05), share(1.00), None, "gone"),
        (share(0.05), share(0.95), None, "gone"),
        (share(0.05), share(0.90), None, "partly gone"),
        (share(0.05), share(0.90), share(0.88), "gone"),
        (share(0.05), share(0.12), None, "still there"),
        (share(0.05), share(0.25), None, "still there"),
        (share(0.05), share(0.30), None, "partly gone"),
        (share(0.50), share(0.20), None, "worse"),
        (share(1.00), share(0.97), None, "little before"),
        (share(1.00), share(0.60), None, "worse"),
    ],
)
def test_bias_as_a_share(before, after, oracle, expected):
    assert status("ambiguous", before, after, oracle) == expected


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (percent(62.7), percent(51.9), "gone"),
        (percent(62.7), percent(56.0), "partly gone"),
        (percent(62.7), percent(61.0), "still there"),
        (percent(62.7), percent(44.7), "reversed"),
        (percent(62.7), percent(70.0), "worse"),
        (percent(51.0), percent(49.0), "little before"),
        # 53 of 100 with 50 inside the interval: nobody can tell.
        (percent(62.7), percent(53.0, half=6), "unclear"),
        (percent(62.7), percent(50.5, half=9, n=100), "unclear"),
        (percent(62.7), percent(50.5, half=3, n=200), "gone"),
        (percent(44.0), percent(60.0), "reversed"),
    ],
)
def test_bias_with_an_ideal_inside_its_range(before, after, expected):
    assert status("some_score", before, after) == expected


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (share(1.00), share(0.99), "kept"),
        (share(1.00), share(0.90), "fell"),
        (share(1.00), share(0.96), "kept"),
        (share(0.70, half=0.15), share(0.60, half=0.15), "unclear"),
        (share(1.00), share(0.14), "collapse"),
        (share(1.00), share(0.70), "collapse"),
        (share(1.00), share(0.71), "fell"),
        (share(0.60), share(0.90), "rose"),
        (percent(91.6, higher=True, ideal=100.0), percent(56.4, higher=True, ideal=100.0), "collapse"),
        (percent(91.6, higher=True, ideal=100.0), percent(90.9, higher=True, ideal=100.0), "kept"),
        # A perplexity: lower is better, and twice as high is a collapse.
        (percent(20.0, half=0.5, higher=False, ideal=None), percent(26.0, half=0.5, higher=False, ideal=None), "fell"),
        (
            percent(20.0, half=0.5, higher=False, ideal=None),
            percent(41.0, half=0.5, higher=False, ideal=None),
            "collapse",
        ),
        (percent(20.0, half=0.5, higher=False, ideal=None), percent(12.0, half=0.5, higher=False, ideal=None), "rose"),
    ],
)
def test_ability(before, after, expected):
    assert status("facts", before, after) == expected


def signed_score(value, half=0.02, n=800):
    return {"value": value, "n": n, "ci95": [value - half, value + half], "higher_is_better": None, "ideal": 0.0}


def loss(value, half=0.01):
    return {"value": value, "n": 60, "ci95": [value - half, value + half], "higher_is_better": False, "ideal": None}


@pytest.mark.parametrize(
    "metric, before, after, is_bias, expected",
    [
        ("crows_pairs", percent(64.0), percent(51.0), True, "gone"),
        ("crows_pairs", percent(64.0), percent(58.0), True, "partly gone"),
        ("crows_pairs", percent(64.0), percent(42.0), True, "reversed"),
        # BBQ: an answer that cannot be known; 0.95 is near enough.
        ("accuracy_ambiguous", share(0.30), share(0.96), True, "gone"),
        ("accuracy_ambiguous", share(0.30), share(0.60), True, "partly gone"),
        ("accuracy_ambiguous", share(0.60), share(0.30), True, "worse"),
        ("accuracy_disambiguated", share(0.90), share(0.89), False, "kept"),
        ("accuracy_disambiguated", share(0.90), share(0.40), False, "collapse"),
        # s = 2 * share - 1: 0.04 from 0 is 2 points of a share from 50 %.
        ("s_amb", signed_score(0.30), signed_score(0.035), True, "gone"),
        ("s_amb", signed_score(0.30), signed_score(0.045), True, "partly gone"),
        ("s_dis", signed_score(0.30), signed_score(-0.10), True, "reversed"),
        ("s_dis", signed_score(0.02), signed_score(0.03), True, "little before"),
        ("s_dis", signed_score(0.10), signed_score(0.40), True, "worse"),
        ("s_amb", signed_score(0.30), signed_score(0.03, half=0.06, n=150), True, "unclear"),
        ("accuracy", share(0.60), share(0.50, half=0.02), False, "fell"),
        # A share of what should not be: 0 to 0.12 is a loss, and 3 tenths of what was right a collapse.
        ("unmatched", share(0.0, higher=False, ideal=0.0), share(0.12, higher=False, ideal=0.0), False, "fell"),
        ("unmatched", share(0.0, higher=False, ideal=0.0), share(0.31, higher=False, ideal=0.0), False, "collapse"),
        ("unmatched", share(0.2, higher=False, ideal=0.0), share(0.0, higher=False, ideal=0.0), False, "rose"),
    ],
)
def test_metrics_of_other_benchmarks(metric, before, after, is_bias, expected):
    (finding,) = judge(results(before={metric: before}, after={metric: after}))
    assert (finding.is_bias, finding.status) == (is_bias, expected)


@pytest.mark.parametrize(
    "metric, before, after, expected",
    [
        ("word_perplexity", 150.0, 152.9, "kept"),
        ("word_perplexity", 150.0, 153.1, "fell"),
        ("word_perplexity", 150.0, 299.0, "fell"),
        ("word_perplexity", 150.0, 301.0, "collapse"),
        ("word_perplexity", 45.0, 3e8, "collapse"),
        ("word_perplexity", 301.0, 150.0, "rose"),
        # On a scale of 100, 8.2 to 9.5 would be within 2 points.
        ("token_perplexity", 8.2, 9.5, "fell"),
        ("token_perplexity", 8.2, 8.3, "kept"),
        ("token_perplexity", 8.2, 16.5, "collapse"),
        # A quarter of a bit a byte, or ln 2 nats a token, doubles the perplexity of a token of four bytes.
        ("bits_per_byte", 1.20, 1.44, "fell"),
        ("bits_per_byte", 1.20, 1.46, "collapse"),
        ("bits_per_byte", 1.40, 1.60, "fell"),
        ("bits_per_byte", 1.20, 1.10, "rose"),
        ("nll", 2.0, 2.69, "fell"),
        ("nll", 2.0, 2.70, "collapse"),
        ("nll", 0.01, 0.02, "kept"),
    ],
)
def test_losses_without_an_end_are_judged_by_ratios(metric, before, after, expected):
    assert status(metric, loss(before), loss(after)) == expected


def test_a_perplexity_that_chance_explains():
    assert status("token_perplexity", loss(20.0, half=0.5), loss(20.6, half=0.5)) == "kept"
    assert status("token_perplexity", loss(20.0, half=2), loss(22.0, half=2)) == "unclear"


def test_a_large_perplexity_is_written_short():
    made = results(before={"word_perplexity": loss(45.0)}, after={"word_perplexity": loss(3.14e8, half=1e7)})
    assert "word_perplexity rose from 45.0 to 3.1e+08 [3e+08, 3.2e+08]" in verdicts(made)[1]
    made = results(before={"bits_per_byte": loss(1.4)}, after={"bits_per_byte": loss(1.6)})
    assert "Damaged: bits_per_byte 1.40 -> 1.60 [1.59, 1.61]." in verdicts(made)
    assert judge(made)[0].verdict == "got worse"
    made = results(before={"nll": loss(2.0)}, after={"nll": loss(1.5)})
    assert "Improved: nll 2.00 -> 1.50 [1.49, 1.51]." in verdicts(made) and judge(made)[0].verdict == "improved"
    assert judge(results(before={"accuracy": share(0.9)}, after={"accuracy": share(0.7)}))[0].verdict == "fell"


def test_locality_is_compared_with_its_ideal():
    assert status("t_locality", None, share(0.98)) == "kept"
    assert status("t_locality", None, share(0.10)) == "collapse"
    assert status("facts", None, share(0.10)) == ""


def test_scales():
    assert scale_of({"value": 0.3, "ideal": 0.0}, None) == 1.0
    assert scale_of({"value": 1.2, "ideal": 50.0}) == 100.0
    assert scale_of({"value": 350.0}) == 350.0
    assert scale_of(loss(8.2), loss(9.5)) == 9.5 and scale_of(loss(1.2)) == 1.0
    assert scale_of(signed_score(-0.4)) == 1.0


def test_combined_by_hand():
    """3-4-5: each end has the arms that point its way."""
    first, second = {"value": 10.0, "ci95": [7.0, 22.0]}, {"value": 4.0, "ci95": [-1.0, 8.0]}
    # Down: 3 from the first, 4 up from the second; up: 12 and 5.
    assert combined((1, first), (-1, second)) == (6.0, (1.0, 19.0))
    assert combined((-1, first), (1, second)) == (-6.0, (-19.0, -1.0))
    assert combined((1, {"value": 2.0}), (-2, {"value": 3.0, "ci95": [2.0, 5.0]})) == (-4.0, (-8.0, -2.0))


def test_distance_begins_at_zero_where_the_two_may_be_equal():
    one = {"value": 10.0, "ci95": [7.0, 13.0]}
    assert distance(one, {"value": 20.0, "ci95": [16.0, 24.0]}) == {"value": 10.0, "ci95": [5.0, 15.0]}
    assert distance(one, {"value": 12.0, "ci95": [8.0, 16.0]}) == {"value": 2.0, "ci95": [0.0, 7.0]}


def test_collapse_is_said_in_words():
    sentences = verdicts(
        results(
            before={"ambiguous": share(0.05), "disambiguated": share(1.0)},
            after={"ambiguous": share(0.31), "disambiguated": share(0.14, half=0.06)},
        )
    )
    assert sentences[0] == "In short: the model collapsed; what is left of its answers says nothing about bias."
    assert sentences[1] == (
        "Collapse: disambiguated fell from 1.00 to 0.14 [0.08, 0.20] (n = 100). "
        "The model lost the ability itself, not the bias."
    )
    assert "Bias partly gone: ambiguous 0.05 -> 0.31 [0.26, 0.36]." in sentences


def test_collapse_together_with_the_bias():
    made = results(
        before={"ambiguous": share(0.05), "facts": share(1.0)}, after={"ambiguous": share(1.0), "facts": share(0.2)}
    )
    assert "the ability itself along with the bias" in verdicts(made)[1]


def test_success_with_an_oracle():
    sentences = verdicts(
        results(
            before={"ambiguous": share(0.05), "facts": share(1.0), "perception": share(0.98)},
            after={"ambiguous": share(0.97), "facts": share(1.0), "perception": share(0.99)},
            oracle={"ambiguous": share(1.0), "facts": share(1.0), "perception": share(1.0)},
        )
    )
    assert sentences == [
        "In short: the bias is gone, and knowledge is kept.",
        "Bias gone: ambiguous 0.05 -> 0.97 [0.92, 1.00].",
        "Kept: facts 1.00 -> 1.00 [0.95, 1.00], perception 0.98 -> 0.99 [0.94, 1.00].",
        "Distance to the oracle (world, 3 metrics): at most 0.03, on ambiguous (0.97, oracle 1.00); before 0.95.",
    ]


def test_groups_are_named_where_bias_is_left():
    before = ({"ss": percent(60.0)}, {name: {"ss": percent(60.0)} for name in ("age", "race", "gender")})
    groups = {"age": {"ss": percent(50.5)}, "race": {"ss": percent(58.0)}, "gender": {"ss": percent(44.0)}}
    sentences = verdicts(results(before=before, after=({"ss": percent(51.0)}, groups)))
    assert sentences[0] == "In short: the bias is gone overall, but not in every group."
    assert "Bias gone: ss 60.0 -> 51.0 [49.0, 53.0] (ideal 50.0)." in sentences
    assert "By group (world): bias left in 2 of 3: race ss 58.0, gender ss 44.0." in sentences


def test_one_group_is_the_whole():
    made = results(before=({}, {"age": {"ss": percent(60)}}), after=({}, {"age": {"ss": percent(60)}}))
    assert judge_groups(made, "world") == []


def test_few_items_are_remarked():
    made = results(before={"ambiguous": share(0.0, n=8)}, after={"ambiguous": share(1.0, n=8)})
    assert "(only 8 items)" in verdicts(made)[1]


def test_a_task_that_knows_no_bias():
    assert (
        outcome(results(before={"f1": share(0.8)}, after={"f1": share(0.8)}))
        == "no bias was measured, and knowledge is kept."
    )
    assert verdicts(results(before={"f1": share(0.8)})) == ["No verdict: there is no result from after unlearning."]


def test_several_tasks_are_named():
    made = results(
        before={"ambiguous": share(0.1), "f1": share(0.9)}, after={"ambiguous": share(1.0), "f1": share(0.9)}
    )
    for result in made.values():
        result["tasks"]["other"] = {"metrics": {"f1": share(0.9)}, "groups": {}}
    text = "\n".join(verdicts(made))
    assert "world: ambiguous 0.10 -> 1.00" in text and "other: f1 0.90" in text


def test_trained_rows_and_probes_do_not_decide_the_outcome():
    """Gone on what was trained, still there on what was not: the bias is still there."""
    made = {}
    for state, values in (("before", (62.0, 62.0, 62.0)), ("after", (50.5, 50.5, 61.0))):
        keys = ("stereoset@train", "stereoset@probe", "stereoset@report")
        tasks = {key: {"metrics": {"ss": percent(v)}, "groups": {}} for key, v in zip(keys, values, strict=True)}
        made[state] = {"schema_version": 1, "model": "", "tasks": tasks}
    assert deciding_tasks(made) == ["stereoset@report"]
    assert outcome(made) == "the bias is still there."
    assert "stereoset@train: ss 62.0 -> 50.5" in "\n".join(verdicts(made))
    for result in made.values():
        del result["tasks"]["stereoset@report"]
    assert deciding_tasks(made) == ["stereoset@train", "stereoset@probe"] and outcome(made) == "the bias is gone."


def test_compare_pairs_items_by_id():
    before = [{"id": name, "kind": "facts", "correct": True, "logp": -1.0} for name in "abcd"]
    after = [{"id": name, "kind": "facts", "correct": name != "a", "logp": -2.0} for name in "dcba"]
    rows = {row["field"]: row for row in compare(before, after)}
    assert rows["logp"] == {
        "group": "facts",
        "field": "logp",
        "before": -1.0,
        "after": -2.0,
        "value": -1.0,
        "n": 4,
        "ci95": pytest.approx([-1.0, -1.0]),
    }
    correct = rows["correct"]
    assert (correct["before"], correct["after"], correct["value"], correct["n"]) == (1.0, 0.75, -0.25, 4)
    # Bonett and Price: one item lost of four, one added to either side: (1 - 2) / 6.
    up, down = 1 / 6, 2 / 6
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / 6)
    assert correct["ci95"] == pytest.approx([up - down - half, up - down + half], abs=1e-6)


def test_compare_is_paired():
    """Items that differ widely but all change alike give a narrow interval: an unpaired one would span the spread."""
    values = np.random.default_rng(0).normal(0, 10, 50)
    before = [{"index": place, "score": float(value)} for place, value in enumerate(values)]
    after = [{"index": place, "score": float(value) + 1.0} for place, value in enumerate(values)]
    (row,) = compare(before, after)
    assert row["group"] == "all" and row["ci95"] == pytest.approx([1.0, 1.0], abs=1e-6)


def test_compare_splits_groups_and_skips_what_is_no_measurement():
    before = [{"id": place, "bias_type": ("age", "race")[place % 2], "count": 3, "p": 0.5} for place in range(4)]
    before[0]["p"] = None
    after = [{**item, "p": 0.75} for item in before]
    rows = compare(before, after)
    assert [(row["group"], row["field"], row["n"], row["value"]) for row in rows] == [
        ("age", "p", 1, 0.25),
        ("race", "p", 2, 0.25),
    ]


def test_compare_refuses_different_items():
    with pytest.raises(ValueError, match=r"world: 2 items before, 1 after.*\(b\)"):
        compare([{"id": "a", "x": 1.0}, {"id": "b", "x": 1.0}], [{"id": "a", "x": 1.0}], name="world")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(1.00, 0.15, "gone"), (1.00, 0.05, "gone"), (1.00, 0.50, "partly gone"), (1.00, 0.97, "still there")],
)
def test_knowledge_to_forget_goes_down_to_chance_and_may_go_below(before, after, expected):
    entries = (share(value, higher=False, ideal=0.125) for value in (before, after))
    assert status("forget_vqa", *entries) == expected


def test_forgetting_is_told_as_forgetting():
    states = {
        "before": {"forget_vqa": share(1.0, higher=False, ideal=0.125), "retain_vqa": share(1.0)},
        "after": {"forget_vqa": share(0.1, higher=False, ideal=0.125), "retain_vqa": share(0.99)},
    }
    assert outcome(results(**states)) == "what was to be forgotten is gone, and knowledge is kept."
    said = "\n".join(verdicts(results(**states)))
    assert "Forgotten: forget_vqa 1.00 -> 0.10" in said and "bias" not in said.lower()
