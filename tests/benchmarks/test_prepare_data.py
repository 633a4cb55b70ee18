"""The sets that `recipes/prepare_data.py` writes can be trained on, and share nothing that they may not share."""

import importlib.util
from pathlib import Path

import pytest

from biasunlearn_trainer.data_builders.leakage import find_leakage
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prepare():
    spec = importlib.util.spec_from_file_location("prepare_data", ROOT / "recipes" / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def sets_of(folder):
    return {file.stem: load_rows(file) for file in sorted(folder.glob("*.jsonl"))}


def test_mllmu_bench(prepare, mllmu, tmp_path):
    prepare(["mllmu_bench", str(mllmu / "forget_5"), "--output", str(tmp_path / "out")])
    sets = sets_of(tmp_path / "out")
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 2, "retain": 4, "preserve": 7}
    assert len(list((tmp_path / "out" / "pictures").iterdir())) == 3, "a portrait is stored once"
    assert sets["forget"][0]["images"][0].getpixel((0, 0)) == (0, 40, 90)
    assert set(sets["preserve"]["part"]) == {"forget_qa", "retain_vqa", "retain_qa"}
    assert [len(row["images"]) for row in sets["preserve"]] == [0, 1, 1, 1, 1, 0, 0]
    assert find_leakage(sets) == []


def test_clear_in_plain_text(prepare, clear, tmp_path):
    prepare(["clear", str(clear / "forget05"), "--output", str(tmp_path / "out"), "--plain"])
    sets = sets_of(tmp_path / "out")
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 2, "retain": 2, "preserve": 4}
    assert sets["forget"][0]["prompt"] == "Question: What can you see in this picture?\nAnswer:"


def test_tofu_with_refusals(prepare, tofu, tmp_path, data_dir):
    refusals = data_dir / "tofu" / "idontknow.jsonl"
    prepare(["tofu", str(tofu / "forget10"), "--output", str(tmp_path / "out"), "--refusals", str(refusals)])
    sets = sets_of(tmp_path / "out")
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 1, "retain": 1, "preferred": 1}
    assert sets["preferred"][0]["prompt"] == sets["forget"][0]["prompt"]
    assert sets["preferred"][0]["completion"][0]["content"] == "I'm not certain about that."
    with pytest.raises(ValueError, match="no forget configuration"):
        prepare(["tofu", str(tofu / "retain90"), "--output", str(tmp_path / "out")])


def test_sb_bench(prepare, sb_rows, save_sb, tmp_path):
    # Four templates a category: two to forget, one each to retain and to report.
    rows = [{**sb_rows[2], "id": f"07_{i:02}_0003_1_01", "question": f"Who was late to {i}?"} for i in range(4)]
    save_sb(rows, tmp_path)
    prepare(["sb_bench", str(tmp_path / "real"), "--output", str(tmp_path / "out")])
    sets = sets_of(tmp_path / "out")
    assert {name: len(rows) for name, rows in sets.items()} == {"forget": 2, "preferred": 2, "retain": 1, "report": 1}
    assert set(sets["forget"]["completion"]) == {" The Muslim man"} and set(sets["retain"]["completion"]) == {
        " Unknown"
    }
    assert find_leakage({name: sets[name] for name in ("forget", "retain", "report")}) == []
    assert sets["report"][0]["rejected"] == " The Muslim man"
    task = load_task(f"planted@sb_bench={tmp_path / 'out' / 'report.jsonl'}")
    assert task.rows[0]["kind"] == "ambiguous"


RECIPE = """
method: ga_diff
model_name_or_path: {model}
forget_dataset: sets/forget.jsonl
retain_dataset: sets/retain.jsonl
tasks: [{task}]
max_steps: 1
per_device_train_batch_size: 2
use_cpu: true
disable_tqdm: true
output_dir: out
"""


def test_a_run_from_published_layout_to_report(prepare, clear, tiny_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(["clear", str(clear / "forget05"), "--output", "sets"])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_llava, task=f"clear@train={clear / 'forget05_perturbed'}"))
    results = run(parse_recipe([str(recipe)]))
    before, after = (results[when].tasks["clear@train"].metrics for when in ("before", "after"))
    assert set(before) == {"vqa_accuracy", "vqa_probability", "vqa_truth_ratio"} == set(after)
    assert before["vqa_probability"].value != after["vqa_probability"].value
    assert "vqa_probability" in (tmp_path / "out" / "report.md").read_text()
    # Without the label the task would report captions that were trained on.
    recipe.write_text(RECIPE.format(model=tiny_llava, task=f"clear={clear / 'forget05_perturbed'}"))
    with pytest.raises(RecipeError, match=r"2 row\(s\) of the report set are in the forget set too"):
        run(parse_recipe([str(recipe), "--overwrite_output_dir", "true"]))
