"""The benchmark of a model: built by its recipe, filtered by a real tiny model, measured by its task."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset

from biasunlearn_trainer.data_builders.build import build
from biasunlearn_trainer.data_builders.build_recipe import read_build_recipe
from biasunlearn_trainer.data_builders.debias_benchmark import item_key
from biasunlearn_trainer.eval.schema import load_results
from biasunlearn_trainer.eval.scoring import CompletionScore, Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.model_filter import filter_set, main
from biasunlearn_trainer.models import load_model, load_processor

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "data" / "debias_benchmark.yaml"
SPLITS = {"ic_report", "vqa_forget", "vqa_preferred", "vqa_report", "text"}


@pytest.fixture(scope="module")
def built(data_dir, tmp_path_factory):
    """What the recipe makes of PAIRS (the crimes alone) and 40 questions of NQ-open, the other sources being absent."""
    folder = tmp_path_factory.mktemp("benchmark")
    words = ["--output_dir", str(folder / "set"), "--sources.3.limit", "40", "--sources.2.sections", "potential_crime"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BIASUNLEARN_DATA", str(data_dir))
        recipe = read_build_recipe(RECIPE, words)
    assert recipe.left_out == ["vlstereoset", "pata", "okvqa"]
    build(recipe, show_progress=False)
    return folder / "set"


def rows_of(folder):
    files = {path.stem: str(path) for path in (folder / "data").glob("*.parquet")}
    return {name: load_dataset("parquet", data_files=file, split="train") for name, file in files.items()}


def test_what_the_recipe_builds(built):
    sets = rows_of(built)
    assert set(sets) == SPLITS
    assert {name: len(rows) for name, rows in sets.items()} == {
        **{"vqa_forget": 20, "vqa_preferred": 20},
        **{"ic_report": 20, "vqa_report": 2 * 20 + 20, "text": 20},
    }
    assert set(sets["vqa_forget"]["polarity"]) == {"stereotype"}
    assert "Sources that were not there: vlstereoset, pata, okvqa." in (built / "README.md").read_text()


class Prefers:
    """Prefers the biased sentence of one person's pictures."""

    def __init__(self, name):
        self.name, self.asked = name, []

    def score(self, rows, desc=None, append_eos=None):
        assert append_eos is False
        self.asked.append(len(rows))
        likely = [self.name in row["source_id"] and desc == "rejected" for row in rows]
        return [CompletionScore(-1.0 if yes else -2.0, 1, False, ()) for yes in likely]


def test_items_stay_in_all_splits_or_none(built, tmp_path):
    scorer = Prefers("black_man")
    record = filter_set(built, tmp_path / "mine", scorer, "made_up")
    assert scorer.asked == [40, 40], "each item is scored once, whatever its splits"
    assert record["items"] == {"race": {"kept": 10, "of": 40}}
    assert json.loads((tmp_path / "mine" / "filter.json").read_text()) == record
    sets = rows_of(tmp_path / "mine")
    assert {name: len(rows) for name, rows in sets.items()} == {
        **{"vqa_forget": 5, "vqa_preferred": 5},
        **{"ic_report": 20, "vqa_report": 2 * 5 + 20, "text": 20},
    }
    forgotten = {item_key(row) for row in sets["vqa_forget"]}
    assert forgotten == {item_key(row) for row in sets["vqa_preferred"]}
    assert all("black_man" in key[1] for key in forgotten)
    assert "| race | 10 | 40 |" in (tmp_path / "mine" / "README.md").read_text()


def test_a_real_model_begins_at_zero(built, tiny_llava, tmp_path, capsys):
    output = tmp_path / "tiny"
    words = ["--model", str(tiny_llava), "--data", str(built), "--output", str(output), "--batch_size", "8"]
    assert main(words) == 0
    assert "race: " in capsys.readouterr().out
    kept = json.loads((output / "filter.json").read_text())["items"]["race"]["kept"]
    assert 0 < kept < 40
    task = load_task(f"debias_vqa@report={output}")
    scorer = Scorer(load_model(tiny_llava), load_processor(tiny_llava), batch_size=8)
    items = task.run(scorer)
    metrics = task.summarise(items, items).metrics
    assert metrics["reliability"].value == 0.0
    assert metrics["t_locality"].value == 1.0 and metrics["t_locality"].n == 20
    assert metrics["reliability"].n == metrics["t_generality"].n


def test_what_cannot_be_filtered(built, tmp_path, tiny_llava, capsys):
    with pytest.raises(ValueError, match="another folder"):
        filter_set(built, built, Prefers("x"), "m")
    with pytest.raises(ValueError, match="prefers the biased sentence of none of the 40 items"):
        filter_set(built, tmp_path / "none", Prefers("nobody"), "m")
    assert not (tmp_path / "none").exists()
    words = ["--model", str(tiny_llava), "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(words) == 2
    assert "is no built set" in capsys.readouterr().err


@pytest.mark.slow
def test_each_bias_type_is_unlearned_and_all_are_measured(data_dir, tiny_llava, tmp_path, monkeypatch):
    """From recipe to matrix: a set a bias type with one report split, two runs, one picture."""
    from biasunlearn_trainer.eval.cross_bias import main as cross_bias
    from biasunlearn_trainer.runner.run import main as run

    monkeypatch.setenv("BIASUNLEARN_DATA", str(data_dir))
    prints, runs = set(), []
    for bias_type in ("race", "gender"):
        folder, out = tmp_path / bias_type, tmp_path / f"run_{bias_type}"
        words = ["--output_dir", str(folder), "--sources.3.limit", "20"]
        for split in ("vqa_forget", "vqa_preferred"):
            words += [f"--splits.{split}.where.bias_type", bias_type]
        report = build(read_build_recipe(RECIPE, words), show_progress=False)
        prints.add(report.splits["vqa_report"].fingerprint)
        assert set(report.splits["vqa_forget"].bias_types) == {bias_type}
        words = [
            "--method",
            "npo",
            "--retain_loss",
            "nll",
            "--model_name_or_path",
            str(tiny_llava),
            "--use_cpu",
            "true",
        ]
        words += ["--forget_dataset", str(folder / "data/vqa_forget.parquet"), "--max_steps", "2"]
        words += ["--retain_dataset", str(folder / "data/vqa_preferred.parquet"), "--output_dir", str(out)]
        words += ["--tasks", f"debias_vqa@report={folder}", "--save_strategy", "no", "--report_to", "none"]
        assert run([*words, "--per_device_train_batch_size", "2", "--learning_rate", "1e-2"]) == 0
        runs.append(f"{bias_type}={out}")
    assert len(prints) == 1, "all runs are measured on the same rows"
    after = load_results(out / "results.json")["after"].tasks["debias_vqa@report"]
    assert {"reliability", "t_generality", "t_locality", "t_locality_kl"} <= set(after.metrics)
    assert after.metrics["t_locality_kl"].value > 0
    assert set(after.groups) == {"race", "gender"}
    assert cross_bias([*runs, "--task", "debias_vqa@report", "--figure", str(tmp_path / "matrix.png")]) == 0
