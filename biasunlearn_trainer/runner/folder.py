"""The folder of a run: whose results lie there, what may be deleted or resumed, what is recorded beside the results."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from biasunlearn_trainer.checkpoints import PREFIX, UNFINISHED, faults_of, last_usable, read_seal
from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.run_files import (
    CASES_FOLDER,
    ENVIRONMENT_FILE,
    FIGURE_FILE,
    REPORT_FILE,
    RESOLVED_FILE,
    RESULTS_FILE,
    STATE_FILE,
)
from biasunlearn_trainer.sharding import backend
from biasunlearn_trainer.trainers.checkpointing import misfits, model_name

logger = logging.getLogger(__name__)

RECORDS_FOLDER = "records"
"""What was measured before training, for a run that is continued; deleted at the end of the run."""
RUN_FILES = (
    RESOLVED_FILE,
    ENVIRONMENT_FILE,
    RESULTS_FILE,
    STATE_FILE,
    REPORT_FILE,
    FIGURE_FILE,
    CASES_FOLDER,
    f"{PREFIX}*",
    UNFINISHED,
    RECORDS_FOLDER,
    "config.json",
    "model*.safetensors*",
    "adapter_*",
    "training_args.bin",
)
"""What a run writes; a folder with any of it belongs to a run, and only this is deleted by `overwrite_output_dir`."""
PACKAGES = (
    "biasunlearn_trainer",
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "datasets",
    "safetensors",
    "numpy",
)
MAY_CHANGE = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dry_run",
    "max_steps",
    "num_train_epochs",
    # Their product with the number of processes has to stay; the checkpoint says what it was.
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "reference_cache_dir",
    "saliency_cache_dir",
    "tasks",
    "probes",
    "oracle_model",
    "case_studies",
    "allow_leakage",
    "disable_tqdm",
    "push_to_hub",
    "report_to",
    "run_name",
)
MAY_CHANGE_PREFIXES = ("save_", "logging_", "log_", "eval_", "probe_", "guard_", "dataloader_", "hub_")
"""Keys that a resumed run may set otherwise than the run it continues."""


def nearest_folder(path: str | os.PathLike) -> Path:
    """The path itself, or the first of the folders above it that is there."""
    path = Path(path).absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_writable(recipe: Recipe) -> None:
    """Refuses an output folder that nothing can be written into, before anything is loaded; leaves no trace.

    Raises:
        RecipeError: a file stands in its way, its file system is read-only or full, or its rights do not allow it.
    """
    output_dir = recipe.training.output_dir
    folder = nearest_folder(output_dir)
    try:
        if not folder.is_dir():
            raise NotADirectoryError(0, "it is a file")
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as err:
        raise RecipeError(
            [
                f"output_dir {output_dir}: nothing can be written into {folder} ({err.strerror}). Choose another "
                "output_dir, or make room or rights for it."
            ]
        ) from err


def prepare_folder(recipe: Recipe, config: Any, may_delete: bool) -> str | None:
    """Refuses a folder with another run's results, clears it when told to, or finds the checkpoint to continue from.

    Args:
        recipe: with its testbed resolved.
        config: the model's configuration.
        may_delete: whether to clear the folder here: on the main process, outside a dry run.

    Returns:
        The checkpoint to resume from, or None for a start from the beginning.

    Raises:
        RecipeError: the folder holds results and the recipe says neither overwrite nor resume; or it says resume, and
            the run there was another one, or the named checkpoint is not there or broken.
    """
    folder = Path(recipe.training.output_dir)
    found = sorted({path for pattern in RUN_FILES for path in folder.glob(pattern)})
    resume = recipe.training.resume_from_checkpoint
    if resume and resume != "false":
        return _checkpoint_of(recipe, config, folder, resume)
    if found and not recipe.run.overwrite_output_dir:
        names = ", ".join(path.name for path in found[:4]) + (", ..." if len(found) > 4 else "")
        raise RecipeError(
            [
                f"output_dir {folder} holds another run's results ({names}). Choose another output_dir, set "
                "overwrite_output_dir: true to delete them, or resume_from_checkpoint: true to continue that run."
            ]
        )
    if may_delete:
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return None


def _checkpoint_of(recipe: Recipe, config: Any, folder: Path, resume: str) -> str | None:
    """The checkpoint to continue from, as the main process finds it: reading all of one takes time."""
    found = _find_checkpoint(recipe, config, folder, resume) if PartialState().is_main_process else None
    checkpoint, faults = broadcast_object_list([found])[0]
    if faults:
        raise RecipeError(
            faults, f"the run in {Path(checkpoint).parent if checkpoint else folder} cannot be resumed: it"
        )
    return checkpoint


def _find_checkpoint(recipe: Recipe, config: Any, folder: Path, resume: str) -> tuple[str | None, list[str]]:
    if resume == "true":
        faults = _changed_keys(recipe, folder / RESOLVED_FILE)
        checkpoint = None if faults else last_usable(folder)
        if not faults and checkpoint is None:
            logger.warning("%s holds no complete checkpoint; the run starts from the beginning.", folder)
    else:
        checkpoint = Path(resume)
        faults = _changed_keys(recipe, checkpoint.parent / RESOLVED_FILE)
        faults += [f"{resume} is no complete checkpoint: {fault}." for fault in faults_of(resume)]
    if checkpoint is not None and not faults:
        args = recipe.training
        now = {
            "method": recipe.trainer_class.__name__,
            "model": model_name(config._name_or_path),
            "backend": backend(),
            "processes": args.world_size,
            "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }
        faults = misfits(checkpoint, read_seal(checkpoint)["run"], now, folder)
    return str(checkpoint) if checkpoint else None, faults


def check_same_start(checkpoint: str, data: Mapping[str, Mapping[str, Any]], model_hash: str | None = None) -> None:
    """Refuses to continue with other rows or other weights below than the run began with.

    Args:
        checkpoint: what is continued from; the run's records lie beside it.
        data: what `describe_data` returns.
        model_hash: fingerprint of the weights before unlearning; None where they are not loaded yet.

    Raises:
        RecipeError: naming every set, or the model, that changed.
    """
    path = Path(checkpoint).parent / ENVIRONMENT_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows = before.get("data") or {}
    faults = [
        f"{stream}_dataset: its rows are not those that the run began with ({rows[stream]['rows']}, now {now['rows']})."
        for stream, now in data.items()
        if stream in rows and rows[stream]["fingerprint"] != now["fingerprint"]
    ]
    model = before.get("model") or {}
    if model_hash is not None and model.get("fingerprint", model_hash) != model_hash:
        faults.append(
            f"model_name_or_path: {model['source']} had the fingerprint {model['fingerprint']} when the run began; the "
            f"weights that were loaded now have {model_hash}. An adapter fits no other base than its own."
        )
    if faults:
        raise RecipeError(faults, f"{checkpoint} cannot be continued from: the run")


def _changed_keys(recipe: Recipe, path: Path) -> list[str]:
    if not path.is_file():
        return []
    before = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    faults = []
    for key in sorted({*before, *recipe.given} - set(MAY_CHANGE)):
        default = recipe.specs[key].default if key in recipe.specs else None
        old, new = before.get(key, default), recipe.given.get(key, default)
        if not key.startswith(MAY_CHANGE_PREFIXES) and old != new:
            faults.append(f"had `{key}: {old}`, the recipe has {new}. Set it back, or choose another output_dir.")
    return faults


def write_records(
    recipe: Recipe,
    data: Mapping[str, Mapping[str, Any]],
    model_hash: str,
    adapter: Mapping[str, Any] | None = None,
) -> None:
    """Writes the resolved recipe and the environment beside the results.

    Args:
        recipe: with its testbed resolved.
        data: what `describe_data` returns.
        model_hash: fingerprint of the weights before unlearning.
        adapter: of a transfer, what was put on the model.
    """
    folder = Path(recipe.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / RESOLVED_FILE, recipe.to_yaml())
    environment = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": str(recipe.training.device),
        "processes": recipe.training.world_size,
        "seed": recipe.training.seed,
        "model": {"source": recipe.model.model_name_or_path, "fingerprint": model_hash},
        "data": data,
        **({"adapter": adapter} if adapter else {}),
    }
    write_text(folder / ENVIRONMENT_FILE, json.dumps(environment, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
