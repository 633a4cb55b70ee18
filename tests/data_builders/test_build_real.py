"""StereoSet, CrowS-Pairs, BBQ and PAIRS by their recipes: counts as published, sets that train and are evaluated."""

import json
from pathlib import Path

import pytest

from biasunlearn_trainer.data_builders.build import build
from biasunlearn_trainer.data_builders.build_recipe import read_build_recipe
from biasunlearn_trainer.data_builders.sources.plain import load_rows

ROOT = Path(__file__).resolve().parents[2]
# Rows read: StereoSet 2,123 + 2,106 items x 3 sentences, CrowS-Pairs 1,508 pairs x 2, PAIRS 200 pictures x 3 answers
# (SOURCE.md of each); BBQ's six category files have 11,956 questions, half of them ambiguous, with two answers.
NUM_READ = {"stereoset": 3 * (2123 + 2106), "crows_pairs": 2 * 1508, "pairs": 3 * 200, "bbq": 11956 + 11956 // 2}


@pytest.fixture(scope="module")
def built_set(data_dir, tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("BIASUNLEARN_DATA", str(data_dir))
                recipe = read_build_recipe(ROOT / "recipes/data" / f"{name}.yaml", ["--output_dir", str(folder)])
            made[name] = folder, build(recipe, show_progress=False)
        return made[name]

    return make


def test_stereoset_is_read_whole_and_split_by_target(built_set):
    folder, report = built_set("stereoset")
    assert report.sources[0]["num_rows"] == NUM_READ["stereoset"]
    assert sum(split.num_rows for split in report.splits.values()) == NUM_READ["stereoset"]
    forget, retain, held_out = (load_rows(folder / f"data/{n}.parquet") for n in ("forget", "retain", "report"))
    assert forget["pair_id"] == retain["pair_id"]
    assert not set(forget["target"]) & set(held_out["target"])
    items = json.loads((folder / "data/report.json").read_text())["data"]
    assert 3 * sum(map(len, items.values())) == len(held_out)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("crows_pairs", {"forget": 904, "retain": 904, "report": 604}),
        ("pairs", {"forget": 100, "preferred": 100, "retain": 52, "report": 48}),
        ("bbq", {"forget": 2912, "preferred": 2912, "retain": 2872, "report": 3260}),
    ],
)
def test_the_others_are_read_whole(built_set, name, num_rows):
    folder, report = built_set(name)
    assert report.sources[0]["num_rows"] == NUM_READ[name]
    assert {split: r.num_rows for split, r in report.splits.items()} == num_rows
    assert not any(report.leaks.values())
    assert (folder / "contact_sheet.png").is_file() == (name == "pairs")
    rejected = load_rows(folder / "data/report.parquet", check_images=False)
    assert all(row != answer for row, answer in zip(rejected["rejected"], rejected["completion"], strict=True))


def test_pictures_are_in_the_set_and_no_path_of_this_machine(built_set, data_dir):
    folder, _ = built_set("pairs")
    picture = load_rows(folder / "data/forget.parquet")[0]["images"][0]
    assert picture.size[0] > 100
    assert str(data_dir).encode() not in (folder / "data/forget.parquet").read_bytes()


def run_recipe(tmp_path, model, folder, task):
    from biasunlearn_trainer.runner.run import main

    out = tmp_path / "run"
    words = ["--method", "npo", "--retain_loss", "nll", "--model_name_or_path", str(model), "--use_cpu", "true"]
    words += ["--forget_dataset", str(folder / "data/forget.parquet")]
    words += ["--retain_dataset", str(folder / "data/retain.parquet"), "--output_dir", str(out), "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--tasks", task, "--append_eos", "false"]
    words += ["--report_to", "none"]
    assert main(words) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_stereoset_trains_and_is_evaluated(built_set, tmp_path, tiny_llama):
    folder, _ = built_set("stereoset")
    results = run_recipe(tmp_path, tiny_llama, folder, f"stereoset@report={folder / 'data/report.json'}")
    assert "stereoset@report" in json.dumps(results)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("crows_pairs", "tiny_llama"),
        pytest.param("bbq", "tiny_llama", marks=pytest.mark.slow),
        pytest.param("pairs", "tiny_llava", marks=pytest.mark.slow),
    ],
)
def test_the_others_train_and_are_evaluated(data_dir, tmp_path, request, monkeypatch, name, model):
    monkeypatch.setenv("BIASUNLEARN_DATA", str(data_dir))
    limits = [word for split in ("forget", "retain", "report") for word in (f"--splits.{split}.limit", "12")]
    words = ["--output_dir", str(tmp_path / "set"), *limits]
    build(read_build_recipe(ROOT / "recipes/data" / f"{name}.yaml", words), show_progress=False)
    task = f"planted@report={tmp_path / 'set/data/report.parquet'}"
    results = run_recipe(tmp_path, request.getfixturevalue(model), tmp_path / "set", task)
    assert "reliability" in json.dumps(results)
