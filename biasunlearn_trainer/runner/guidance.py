"""The reference answers of a run: checked where they are there, asked of the original model where they are not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset

from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.guidance import GuidanceBuilder, GuidanceSettings, put_in
from biasunlearn_trainer.guidance.build import COLUMN
from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.runner.data import check_collation
from biasunlearn_trainer.trainers.pubg import with_guidance

STREAM = "guidance"
KEYS = ("guidance_templates", "guidance_private_words", "guidance_max_new_tokens")


def check_guidance(recipe: Recipe, sets: Mapping[str, Dataset], processing_class: Any) -> None:
    """Checks reference answers that are there already, and keys that would have no effect.

    Args:
        recipe: with its testbed resolved.
        sets: rows by stream.
        processing_class: the model's tokenizer or processor.

    Raises:
        RecipeError: for answers that are incomplete or do not collate, and for such keys.
    """
    given = [key for key in KEYS if key in recipe.given]
    if STREAM not in recipe.streams:
        faults = [f"{key}: {recipe.run.method} takes no reference answers; pubg does." for key in given]
    elif _is_to_be_built(sets):
        _settings(recipe)
        return
    else:
        there = "guidance_dataset" if STREAM in sets else f"the column `{COLUMN}` of the forget set"
        faults = [f"{key}: nothing is asked for where {there} has the answers. Drop one of the two." for key in given]
    if faults:
        raise RecipeError(faults, recipe.source)
    if STREAM in recipe.streams:
        _check_streams(recipe, sets, processing_class)


def give_guidance(
    recipe: Recipe, sets: Mapping[str, Dataset], model: torch.nn.Module, processing_class: Any
) -> Mapping[str, Dataset]:
    """Asks the model for reference answers where the method needs them and the sets have none.

    Args:
        recipe: with its testbed resolved.
        sets: rows by stream.
        model: the original model, whole; every process has to call this.
        processing_class: its tokenizer or processor.

    Returns:
        The sets, the forget set with its reference answers.

    Raises:
        RecipeError: an answer does not collate, or the fall-back states what is private.
    """
    if STREAM not in recipe.streams or not _is_to_be_built(sets):
        return sets
    settings = _settings(recipe)
    scorer = Scorer(model, processing_class, recipe.run.eval_batch_size)
    try:
        answers = GuidanceBuilder(scorer, settings).build(sets["forget"])
    except ValueError as err:
        raise RecipeError([f"forget_dataset: {err}"], recipe.source) from err
    sets = {**sets, "forget": put_in(sets["forget"], answers, settings)}
    _check_streams(recipe, sets, processing_class)
    return sets


def _is_to_be_built(sets: Mapping[str, Dataset]) -> bool:
    return STREAM not in sets and COLUMN not in sets["forget"].column_names


def _settings(recipe: Recipe) -> GuidanceSettings:
    run = recipe.run
    chosen = {"private_words": run.guidance_private_words, "max_new_tokens": run.guidance_max_new_tokens}
    if run.guidance_templates is not None:
        chosen["templates"] = tuple(run.guidance_templates)
    try:
        return GuidanceSettings(**chosen)
    except ValueError as err:
        raise RecipeError([f"guidance_templates: {err}"], recipe.source) from err


def _check_streams(recipe: Recipe, sets: Mapping[str, Dataset], processing_class: Any) -> None:
    """Lays the answers out as the trainer will, and turns each into tensors once."""
    trainer, args = recipe.trainer_class, recipe.training
    try:
        forget = with_guidance(sets["forget"], sets[STREAM]) if STREAM in sets else sets["forget"]
        streams = trainer.lay_out(args, trainer.prepare_datasets(args, {"forget": forget}))
    except ValueError as err:
        raise RecipeError([f"forget_dataset: {err}"], recipe.source) from err
    check_collation(recipe, {name: rows for name, rows in streams.items() if name != "forget"}, processing_class)
