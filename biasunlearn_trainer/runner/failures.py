"""Runs that break off: what happened, what is left, what to change, in place of a traceback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from biasunlearn_trainer.checkpoints import NO_SPACE, CheckpointError, last_usable
from biasunlearn_trainer.guards import TrainingFault, memory_advice, ran_out_of_memory
from biasunlearn_trainer.recipe import Recipe
from biasunlearn_trainer.runner.folder import nearest_folder
from biasunlearn_trainer.sharding import backend


class RunError(RuntimeError):
    """A run began and cannot go on; the message says what is left of it and what to change."""


@contextmanager
def explained(recipe: Recipe, phase: str) -> Iterator[None]:
    """Inside, what ends a run from outside the code becomes a `RunError`.

    Args:
        recipe: with its testbed resolved.
        phase: `loading`, `evaluation` or `training`.

    Raises:
        RunError: memory or disk ran out, a checkpoint cannot be written or read, the weights are no numbers.
    """
    try:
        yield
    except (CheckpointError, TrainingFault) as err:
        raise RunError(str(err)) from err
    except Exception as err:
        if ran_out_of_memory(err):
            said = str(err).partition("\n")[0]
            advice = memory_advice(phase, settings_in_force(recipe))
            raise RunError(f"Out of memory in {phase} ({said}). What takes less:\n{advice}\n{left(recipe)}") from err
        if isinstance(err, OSError) and err.errno in NO_SPACE:
            free = shutil.disk_usage(nearest_folder(recipe.training.output_dir)).free / 2**20
            raise RunError(f"The disk is full in {phase} ({err}; {free:.0f} MiB are free). {left(recipe)}") from err
        raise


def settings_in_force(recipe: Recipe) -> dict[str, Any]:
    """The values that memory depends on, by key."""
    args, model = recipe.training, recipe.model
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "max_length")
    return {
        **{name: getattr(args, name) for name in (*names, "reference")},
        **{name: getattr(model, name) for name in ("use_peft", "load_in_4bit", "dtype")},
        "eval_batch_size": recipe.run.eval_batch_size,
        "processes": args.world_size,
        "backend": backend(),
    }


def left(recipe: Recipe) -> str:
    """What a run that broke off can be continued from."""
    folder = last_usable(recipe.training.output_dir, thorough=False)
    if folder is None:
        return "No checkpoint was written yet: resume_from_checkpoint: true starts from the beginning."
    return f"resume_from_checkpoint: true continues from {folder}."
