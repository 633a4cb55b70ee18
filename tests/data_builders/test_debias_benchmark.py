"""The stage that makes the benchmark's rows, and the choice of items by a model's preference."""

import random
from collections import Counter
from pathlib import Path

import pytest

from biasunlearn_trainer.data_builders.build_recipe import read_build_recipe
from biasunlearn_trainer.data_builders.catalogue import SOURCES, STAGES, stage_class
from biasunlearn_trainer.data_builders.debias_benchmark import (
    DebiasBenchmark,
    caption_prompts,
    in_other_words,
    keep_stereotyped,
)
from biasunlearn_trainer.data_builders.prompt_templates import read_templates
from biasunlearn_trainer.data_builders.sources.pata import PataPicture, draw_bias_types
from biasunlearn_trainer.data_builders.stages import Reject

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "data" / "debias_benchmark.yaml"


def pair(source="vlstereoset", number=0, prompt="Caption for the picture:", **more):
    row = {"prompt": prompt, "images": ["a.png"], "bias_type": "race", "source": source, "source_id": str(number)}
    row |= {"pair_id": f"{source}-{number}", "kind": "ambiguous", **more}
    return [
        {**row, "completion": " biased", "polarity": "stereotype", "rejected": None},
        {**row, "completion": " fair", "polarity": "anti_stereotype", "rejected": " biased"},
    ]


def run(rows, **settings):
    return list(DebiasBenchmark(**settings).run(rows))


def test_a_captioned_pair():
    biased, fair, other = run(pair())
    assert [row["kind"] for row in (biased, fair, other)] == ["reliability", "reliability", "t_generality"]
    assert {row["task"] for row in (biased, fair, other)} == {"ic"}
    assert biased["prompt"] == fair["prompt"] == other["original_prompt"] != other["prompt"]
    assert (other["completion"], other["rejected"]) == (" fair", " biased")


def test_both_prompts_are_ours_and_differ():
    templates = read_templates("captioning")
    assert len(templates.texts) == 20
    all_prompts = {templates.fill(n, noun) for n in range(20) for noun in templates.nouns}
    starts = Counter()
    for seed in range(400):
        first, second = caption_prompts(templates, random.Random(seed))
        assert first != second and {first, second} <= all_prompts
        starts[first] += 1
    assert len(starts) > 80, "prompts are drawn from all templates and nouns"


def test_questions_of_pairs(data_dir):
    rows = list(SOURCES["pairs"].read(str(data_dir / "pairs")))
    made = run(rows)
    kinds = Counter((row["kind"], row["polarity"]) for row in made if not isinstance(row, Reject))
    assert kinds == {
        ("reliability", "stereotype"): 200,
        ("reliability", "anti_stereotype"): 200,
        ("t_generality", "anti_stereotype"): 200,
    }
    assert Counter(row.reason for row in made if isinstance(row, Reject)) == {
        "neither the biased sentence nor its opposite": 200
    }
    for row in made:
        if isinstance(row, Reject) or row["kind"] != "t_generality":
            continue
        assert row["task"] == "vqa" and row["prompt"] != row["original_prompt"]
        assert row["prompt"].startswith("Question: ") and row["prompt"].endswith("? Answer:")
        # Both options are still named, in the same order.
        asked = row["prompt"].casefold()
        places = [asked.find(row[side].strip(" .").casefold()) for side in ("completion", "rejected")]
        before = [
            row["original_prompt"].casefold().find(row[side].strip(" .").casefold())
            for side in ("completion", "rejected")
        ]
        assert min(places) >= 0 and (places[0] < places[1]) == (before[0] < before[1])


def test_other_questions_are_left_to_a_language_model():
    assert in_other_words("Question: Who was late? Answer:", random.Random(0)) is None
    question = "Question: Is the person in the picture late or early? Answer:"
    assert [row["kind"] for row in run(pair("pairs", prompt=question))] == [
        "reliability",
        "reliability",
        "t_generality",
    ]
    assert [row["kind"] for row in run(pair("pairs", prompt=question), own_wordings=False)] == ["reliability"] * 2
    assert [row["kind"] for row in run(pair("my_own", prompt="Who?"))] == ["reliability"] * 2


def test_locality_rows_and_what_is_left_out(data_dir):
    question = next(iter(SOURCES["nq_open"].read(str(data_dir / "nq_open"))))
    seen = {**question, "source": "okvqa", "kind": "perception", "images": ["b.png"]}
    caption = {**pair()[0], "polarity": "unrelated", "kind": None}
    text, pictured, *left_out = run(
        [question, seen, caption, {**pair()[1], "images": []}, {**pair()[1], "rejected": ""}]
    )
    assert [(row["kind"], row["task"]) for row in (text, pictured)] == [("t_locality", "both"), ("m_locality", "both")]
    assert [row.reason for row in left_out] == [
        "neither the biased sentence nor its opposite",
        "no picture",
        "no biased sentence beside it (`rejected`)",
    ]


def test_settings_and_name():
    assert stage_class("debias_benchmark") is DebiasBenchmark and DebiasBenchmark.name in STAGES
    first, second = DebiasBenchmark(), DebiasBenchmark(seed=1)
    assert first.settings != second.settings
    assert run(pair())[2]["prompt"] == run(pair())[2]["prompt"]
    drawn = {run(pair(), seed=seed)[2]["prompt"] for seed in range(8)}
    assert len(drawn) > 1


def test_own_templates(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("version: 1\nslot: picture\nnouns: [it]\ntemplates: ['What is {picture}?']\n")
    with pytest.raises(ValueError, match="at least two templates"):
        DebiasBenchmark(templates=str(file))


def test_items_that_a_model_prefers_stereotyped():
    rows = [row for number in range(4) for row in run(pair(number=number, bias_type="age" if number == 3 else "race"))]
    rows.append({"kind": "t_locality", "task": "both", "source": "nq_open", "source_id": "0"})
    logps = {"0": (-5.0, -4.0), "1": (-4.0, -5.0), "2": (-4.0, -4.0), "3": (-5.0, -1.0)}

    def prefers(asked):
        assert [row["polarity"] for row in asked] == ["anti_stereotype"] * 4, "each item is asked about once"
        return [logps[row["source_id"]][1] > logps[row["source_id"]][0] for row in asked]

    # Items 0 and 3 stay, with all three rows; 2 is a tie, and so no bias (equation 4).
    stay, counts = keep_stereotyped(rows, prefers)
    assert stay == [0, 1, 2, 9, 10, 11, 12]
    assert counts == {("race", True): 1, ("race", False): 2, ("age", True): 1}


def test_what_cannot_be_chosen_from():
    rows = run(pair())
    with pytest.raises(ValueError, match="no row of kind `reliability`"):
        keep_stereotyped(rows[:1], lambda asked: [True])
    with pytest.raises(ValueError, match="has two reliability rows, 1 and 4"):
        keep_stereotyped(rows + rows, lambda asked: [True])
    with pytest.raises(ValueError, match="got 0 answers about 1 items"):
        keep_stereotyped(rows, lambda asked: [])


def test_the_recipe_has_the_counts_of_table_1(tmp_path, monkeypatch):
    # How many pictures of PATA's list are in scenes with captions for all three types, for two, for race alone.
    scenes = {"all": ("age", "gender", "race"), "two": ("gender", "race"), "one": ("race",)}
    captions = {scene: dict.fromkeys(types, (["biased"], ["fair"])) for scene, types in scenes.items()}
    numbers = [*["all"] * 2202, *["two"] * 2587, *["one"] * 145]
    pictures = [PataPicture(n, scene, "black", "male", "old", tmp_path) for n, scene in enumerate(numbers)]
    vlstereoset = {"race": 960, "profession": 631, "gender": 323, "religion": 44}
    (tmp_path / "pata").mkdir()
    monkeypatch.setenv("BIASUNLEARN_DATA", str(tmp_path))
    (spec,) = read_build_recipe(RECIPE).sources
    drawn = Counter(draw_bias_types(pictures, captions, counts=spec.options["counts"]).values())
    table_1 = {"age": 680, "gender": 2262, "race": 3026, "profession": 631, "religion": 44}
    assert drawn + Counter(vlstereoset) == table_1 and sum(table_1.values()) == 6643
