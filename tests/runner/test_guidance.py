"""Runs of PUBG: reference answers that are there, that are asked for, and those that do not fit."""

import json

import pytest

from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run
from biasunlearn_trainer.runner.data import _resolve_tasks


@pytest.fixture
def arguments(tmp_path, tiny_llama, monkeypatch):
    """A PUBG recipe on a forget set of four rows, with more columns where they are given."""
    monkeypatch.setenv("BIASUNLEARN_CACHE", str(tmp_path / "cache"))

    def make(*words, method="pubg", **columns):
        rows = [{"prompt": f"Who is {i}?", "completion": " Ann Kor.", **columns} for i in range(4)]
        path = tmp_path / "forget.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "method": method, "model_name_or_path": tiny_llama, "forget_dataset": path, "max_steps": 2,
            "output_dir": tmp_path / "out", "per_device_train_batch_size": 2, "use_cpu": "true", "report_to": "none",
            "disable_tqdm": "true", "save_strategy": "no", "tasks": f"behaviour@train={path}",
        }  # fmt: skip
        return [word for key, value in settings.items() for word in (f"--{key}", str(value))] + list(words)

    return make


def fails(words):
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(words))
    return caught.value.faults


def test_a_run_asks_the_original_model_and_keeps_its_answers(arguments, tmp_path, capsys):
    words = arguments(
        "--guidance_templates", "Look! {prompt}", "--guidance_max_new_tokens", "6", "--logging_steps", "1"
    )
    results = run(parse_recipe(words))
    assert {"leak", "degeneration", "refusal"} <= set(results["after"].tasks["behaviour@train"].metrics)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert any("kl/guidance" in entry for entry in state["log_history"])
    (kept,) = (tmp_path / "cache" / "guidance").glob("*.json")
    assert len(json.loads(kept.read_text().splitlines()[1])) == 4
    written = kept.stat().st_mtime_ns
    run(parse_recipe([*words, "--overwrite_output_dir"]))
    assert kept.stat().st_mtime_ns == written, "the answers were asked for again"


def test_answers_that_are_there_are_checked_before_the_model_is_loaded(arguments):
    assert run(parse_recipe(arguments("--dry_run", guidance="A red hat."))) is None
    (fault,) = fails(arguments("--dry_run", guidance=""))
    assert "4 of 4 forget rows have no reference answer" in fault
    (fault,) = fails(arguments("--dry_run", "--guidance_private_words", "true", guidance="A red hat."))
    assert "guidance_private_words: nothing is asked for where the column `guidance`" in fault
    (fault,) = fails(arguments("--dry_run", "--guidance_templates", " "))
    assert "template is empty" in fault
    (fault,) = fails(arguments("--dry_run", "--guidance_templates", "Look!", method="ga"))
    assert "guidance_templates: ga takes no reference answers" in fault


def test_a_set_of_answers(arguments, tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"Who is {i}?", "completion": " A red hat."} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(parse_recipe(arguments("--dry_run", "--guidance_dataset", str(path)))) is None
    results = run(parse_recipe(arguments("--guidance_dataset", str(path))))
    assert results["after"].tasks and not (tmp_path / "cache" / "guidance").exists()
    path.write_text(json.dumps(rows[0]))
    (fault,) = fails(arguments("--dry_run", "--guidance_dataset", str(path)))
    assert "guidance set has 1 rows for 4 forget rows" in fault


def test_tasks_may_name_data_of_the_testbed():
    recipe = parse_recipe(["--method", "pubg", "--testbed", "entities", "--tasks", "planted", "--use_cpu", "true"])
    data = {"forget": "/x/forget", "planted": "/x/report"}
    recipe.run.tasks = ["planted", "behaviour@train=testbed:forget", "behaviour=testbed:planted", "stereoset=y"]
    _resolve_tasks(recipe, "tasks", data)
    expected = ["planted=/x/report", "behaviour@train=/x/forget", "behaviour=/x/report", "stereoset=y"]
    assert recipe.run.tasks == recipe.given["tasks"] == expected
    recipe.run.tasks = ["behaviour=testbed:forgt"]
    with pytest.raises(RecipeError, match=r"has no 'forgt'; it has: forget, planted"):
        _resolve_tasks(recipe, "tasks", data)
