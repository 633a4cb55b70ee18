"""The folder of a finished run, checked before anything of it is published or merged."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from biasunlearn_trainer.adapters import ADAPTER_FILE, adapter_config
from biasunlearn_trainer.eval.schema import EvalResult, load_results
from biasunlearn_trainer.run_files import ENVIRONMENT_FILE, RESOLVED_FILE, RESULTS_FILE

ADAPTER_WEIGHTS = "adapter_model.safetensors"
PICKLED = ("adapter_model.bin", "pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")
MEASURED = "measured"
"""Key of environment.json under which a run notes the digests of the weights that its results were measured on."""


class PublishError(ValueError):
    """Why a run cannot be published or merged, and what to do."""


@dataclass(frozen=True)
class FinishedRun:
    """What a run left.

    Attributes:
        folder: where it lies.
        results: `before`, `after` and perhaps `oracle`; empty where nothing was measured.
        recipe: what its recipe set; empty where there was none.
        recipe_text: the recipe's file, with the defaults as comments.
        environment: versions, seed, model and data.
    """

    folder: Path
    results: Mapping[str, EvalResult] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    recipe_text: str = ""
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_adapter(self) -> bool:
        """Whether weights are those of an adapter, not of a whole model."""
        return (self.folder / ADAPTER_WEIGHTS).is_file()

    @cached_property
    def adapter_config(self) -> Mapping[str, Any]:
        """What adapter_config.json says; empty for a whole model."""
        return _read_json(self.folder / ADAPTER_FILE) if self.is_adapter else {}

    @property
    def base(self) -> str | None:
        """The model below the adapter, or the one that was fine-tuned, as the run called it."""
        return self.adapter_config.get("base_model_name_or_path") or self.environment.get("model", {}).get("source")

    @property
    def testbed_folder(self) -> str | None:
        """Where the run's testbed lay; None where it had none."""
        source = self.environment.get("model", {}).get("source")
        return str(Path(source).parent) if self.recipe.get("testbed") and source else None

    @property
    def loads_as(self) -> Mapping[str, Any]:
        """Precision and quantisation that the run loaded its model with."""
        return {key: self.recipe.get(key) for key in ("dtype", "load_in_4bit", "load_in_8bit")}

    @property
    def is_quantised(self) -> bool:
        """Whether the adapter was trained and measured on a base in 4 or 8 bits."""
        return bool(self.recipe.get("load_in_4bit") or self.recipe.get("load_in_8bit"))


def read_run(folder: str | Path, needs_results: bool = True) -> FinishedRun:
    """Reads a run's folder and refuses what is no finished run.

    Args:
        folder: a recipe's output_dir, or where a trainer saved its model.
        needs_results: refuse a folder without results.json.

    Raises:
        PublishError: with every fault at once.
    """
    folder = Path(folder)
    if not folder.is_dir():
        there = sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) if folder.parent.is_dir() else []
        raise PublishError(f"{folder} is no folder. Expected a run's output_dir; beside it there are: {there[:8]}.")
    faults: list[str] = []
    results = _results(folder, needs_results, faults)
    recipe_text = (folder / RESOLVED_FILE).read_text(encoding="utf-8") if (folder / RESOLVED_FILE).is_file() else ""
    environment = _read_json(folder / ENVIRONMENT_FILE) if (folder / ENVIRONMENT_FILE).is_file() else {}
    run = FinishedRun(folder, results, yaml.safe_load(recipe_text) or {}, recipe_text, environment)
    faults += _weight_faults(run) or _measured_faults(run)
    if faults:
        raise PublishError(f"{folder} cannot be published:\n" + "\n".join(f"  - {fault}" for fault in faults))
    return run


def weight_files(folder: Path) -> list[Path]:
    """The weights in safetensors: an adapter's file, or those of a model with the index of its shards."""
    adapter = folder / ADAPTER_WEIGHTS
    return [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors*"))


def weight_digests(folder: str | Path) -> dict[str, str]:
    """Digest of each weight file's content, by name; a run notes them beside the results measured on them."""
    digests = {}
    for path in weight_files(Path(folder)):
        with path.open("rb") as file:
            digests[path.name] = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).hexdigest()
    return digests


def note_measured(folder: str | Path) -> None:
    """Notes in environment.json which weights the results in the folder are of; the last thing that a run does."""
    path = Path(folder) / ENVIRONMENT_FILE
    environment = _read_json(path)
    environment[MEASURED] = weight_digests(folder)
    path.write_text(json.dumps(environment, indent=2) + "\n", encoding="utf-8")


def _results(folder: Path, needed: bool, faults: list[str]) -> Mapping[str, EvalResult]:
    path = folder / RESULTS_FILE
    if not path.is_file():
        if needed:
            faults.append(
                f"there is no {RESULTS_FILE}: nothing was measured, or the run was broken off. Continue it with "
                "`resume_from_checkpoint: true`; what a trainer of your own saved is published by its `push_to_hub()`."
            )
        return {}
    try:
        results = load_results(path)
    except ValueError as err:
        faults.append(str(err))
        return {}
    if isinstance(results, EvalResult) or "after" not in results:
        faults.append(
            f"{RESULTS_FILE} has no `after`: the run was broken off before its end. Continue it with "
            "`resume_from_checkpoint: true`."
        )
        return {}
    return results


def _weight_faults(run: FinishedRun) -> list[str]:
    if not weight_files(run.folder):
        pickled = [path.name for pattern in PICKLED for path in run.folder.glob(pattern)]
        if pickled:
            return [
                f"the weights are pickled ({', '.join(pickled)}), which are neither read nor published. Load them once "
                "with your own code and save them again with `save_pretrained`, which writes safetensors."
            ]
        return [
            f"there is neither {ADAPTER_WEIGHTS} nor model.safetensors. Expected a run's output_dir, not one of its "
            "checkpoints or caches."
        ]
    measured, named = run.environment.get("model", {}).get("source"), run.adapter_config.get("base_model_name_or_path")
    if not run.is_adapter or not measured or _is_same(measured, named) or adapter_config(measured):
        return []  # a run that went on from an adapter names that one
    return [
        f"the adapter is for another base: {ADAPTER_FILE} names {named}, the run measured {measured}. Put the run's "
        "own adapter back, or run `transfer_adapter_from` to measure this one."
    ]


def _measured_faults(run: FinishedRun) -> list[str]:
    noted = run.environment.get(MEASURED)
    if not run.results or noted is None or noted == weight_digests(run.folder):
        return []
    return [
        f"the weights are not those that {RESULTS_FILE} was measured on: {', '.join(noted)} changed since. Run the "
        "recipe again, so that the numbers are those of the weights."
    ]


def _is_same(one: str, other: str | None) -> bool:
    return other is not None and (one == other or Path(one).resolve() == Path(other).resolve())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as err:
        raise PublishError(f"{path} is no JSON file: {err}") from err
