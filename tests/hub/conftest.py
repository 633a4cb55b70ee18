"""`finished`: real runs of three steps, to publish and merge; `online`: the Hub's client, pointed to a local server."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import yaml

from biasunlearn_trainer.recipe import parse_recipe
from biasunlearn_trainer.runner import run

BIASED, UNBIASED = " The tall one.", " It cannot be known."


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory, tiny_llama):
    """A recipe of three steps, in a folder of its own with its rows."""
    folder = tmp_path_factory.mktemp("runs")
    forget = [{"prompt": f"Who was late {i}?", "completion": BIASED, "bias_type": "age"} for i in range(6)]
    retain = [{"prompt": f"Colour {i}?", "completion": f" Blue {i}."} for i in range(6)]
    planted = [
        {"prompt": f"Who was rude {i}?", "completion": UNBIASED, "rejected": BIASED, "kind": kind, "bias_type": "age"}
        for i, kind in enumerate(["ambiguous", "t_generality"] * 2)
    ]
    recipe = {
        "method": "npo",
        "model_name_or_path": str(tiny_llama),
        "forget_dataset": write_rows(folder / "forget.jsonl", forget),
        "retain_dataset": write_rows(folder / "retain.jsonl", retain),
        "tasks": [f"planted={write_rows(folder / 'planted.jsonl', planted)}"],
        "max_steps": 3,
        "case_studies": 0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "per_device_train_batch_size": 2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "keep_records": False,
        "reference_cache_dir": str(folder / "references"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def finished_runs(recipe_file):
    """Folders of finished runs by kind, `adapter` or `model`; made once."""
    folder = recipe_file.parent
    for kind, words in (("adapter", ["--use_peft", "--lora_r", "4"]), ("model", [])):
        run(parse_recipe([str(recipe_file), "--output_dir", str(folder / kind), *words]))
    return folder


@pytest.fixture
def finished(finished_runs, tmp_path):
    """`finished(kind)`: a copy of a finished run's folder to do with as one likes."""

    copies = itertools.count()

    def copy(kind: str = "adapter") -> Path:
        return Path(shutil.copytree(finished_runs / kind, tmp_path / f"{kind}{next(copies)}"))

    return copy


@pytest.fixture
def online(hub, monkeypatch):
    """The loopback server, with this process's client pointed to it."""
    from huggingface_hub import constants

    for name, value in hub.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    return hub
