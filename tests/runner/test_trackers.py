"""Trackers by `report_to`: losses, probes, the run's table and picture reach them; a missing one is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run

UNBIASED, BIASED = " It cannot be known.", " The tall one."


@pytest.fixture
def recipe_for(tmp_path, tiny_llama):
    """`recipe_for(tracker, ...)`: a run of two steps with a probe."""
    rows = {
        "forget": [{"prompt": f"Who was late {i}?", "completion": BIASED} for i in range(4)],
        "retain": [{"prompt": f"Colour {i}?", "completion": " Blue."} for i in range(4)],
        "planted": [{"prompt": "Sky?", "completion": " Grey.", "rejected": None, "kind": "facts"}]
        + [
            {"prompt": f"Who was rude {i}?", "completion": UNBIASED, "rejected": BIASED, "kind": "ambiguous"}
            for i in range(2)
        ],
    }
    for name, part in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    settings = {
        "method": "npo",
        "model_name_or_path": str(tiny_llama),
        "forget_dataset": str(tmp_path / "forget.jsonl"),
        "retain_dataset": str(tmp_path / "retain.jsonl"),
        "tasks": [f"planted={tmp_path / 'planted.jsonl'}"],
        "probes": ["planted"],
        "probe_steps": 1,
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "case_studies": 0,
        "keep_records": False,
        "reference_cache_dir": str(tmp_path / "references"),
        "output_dir": str(tmp_path / "out"),
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))

    def parse(tracker: str, *words: str):
        return parse_recipe([str(tmp_path / "recipe.yaml"), "--report_to", tracker, *words])

    return parse


def test_tensorboard_holds_training_probes_and_the_runs_end(recipe_for, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = run(recipe_for("tensorboard"))
    [folder] = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss/forget", "train/loss/retain", "train/logps/forget"} <= set(tags["scalars"])
    assert [event.step for event in events.Scalars("train/loss/forget")] == [1, 2]
    assert [event.step for event in events.Scalars("train/probe/planted/facts")] == [0, 1, 2]
    for state in ("before", "after"):
        [logged] = events.Scalars(f"results/{state}/planted/reliability")
        assert logged.value == pytest.approx(results[state].tasks["planted"].metrics["reliability"].value)
    [table] = events.Tensors("results/planted/text_summary")
    assert b"| metric | before | after |" in table.tensor_proto.string_val[0]
    [picture] = events.Images("results/report")
    assert picture.width > 300 and picture.encoded_image_string.startswith(b"\x89PNG")


def test_wandb_offline_holds_the_same(recipe_for, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(recipe_for("wandb"))
    folder, summary = Path(wandb.run.dir), dict(wandb.run.summary)
    wandb.finish()
    assert {"train/loss/forget", "train/probe/planted/facts", "results/after/planted/reliability"} <= set(summary)
    names = [path.name for path in (folder / "media").rglob("*") if path.is_file()]
    assert any(name.endswith(".table.json") for name in names) and any(name.endswith(".png") for name in names)


READ_TRACKIO = """
import sys
from biasunlearn_trainer.runner import main
assert main([sys.argv[1], "--report_to", "trackio", "--project", "ours"]) == 0
import trackio
from trackio.sqlite_storage import SQLiteStorage
[only] = trackio.Api().runs("ours")
print("NAMES", only.name, *{name for record in SQLiteStorage.get_logs("ours", only.name) for name in record})
"""


def test_trackio_holds_the_same_in_one_run(recipe_for, tmp_path):
    """In a process of its own: trackio reads where its files lie when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed: pip install trackio")
    done = subprocess.run(
        [sys.executable, "-c", READ_TRACKIO, str(tmp_path / "recipe.yaml")],
        env={**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    name, *logged = done.stdout.split("NAMES ")[1].split()
    assert name.startswith("out-")
    assert {"train/loss/forget", "train/probe/planted/facts", "results/after/planted/reliability"} <= set(logged)


@pytest.mark.parametrize(
    ("tracker", "words"),
    [
        ("tensorbord", ("there is no tracker 'tensorbord'", "Did you mean tensorboard?")),
        ("swanlab", ("swanlab is not installed", "`pip install swanlab`")),
    ],
)
def test_a_tracker_that_is_not_there_is_named_before_anything_is_loaded(tracker, words, recipe_for, tmp_path):
    with pytest.raises(RecipeError) as caught:
        run(recipe_for(tracker, "--model_name_or_path", "nobody/nothing"))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")
