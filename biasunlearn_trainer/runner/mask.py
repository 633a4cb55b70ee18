"""The command `python -m biasunlearn_trainer.saliency`: a recipe's mask and nothing more.

The mask is made by the recipe's own trainer as a run makes it, so that the run finds it in the cache.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.recipe import Recipe, RecipeError, parse_recipe
from biasunlearn_trainer.runner.data import check_collation, check_leaks, load_streams, load_tasks, resolve_testbed
from biasunlearn_trainer.runner.guidance import check_guidance, give_guidance
from biasunlearn_trainer.runner.launch import check_launch
from biasunlearn_trainer.runner.models import load_for_run
from biasunlearn_trainer.runner.run import build_trainer, config_and_processor
from biasunlearn_trainer.runner.saliency import most_changed_in, write_mask_report
from biasunlearn_trainer.saliency.distribution import Distribution, Share, groups_table
from biasunlearn_trainer.saliency.modules import modules_table, rank_modules, target_modules_line
from biasunlearn_trainer.saliency.report import TEXT_FILE, density_sentence

MASK_FILE = "mask.safetensors"


def build_parser() -> argparse.ArgumentParser:
    """The options beside the recipe's own keys."""
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.saliency RECIPE.yaml [--key value ...]",
        description="Builds a recipe's saliency mask, or takes it from the cache, and shows where it lies.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the files; the recipe's output_dir by default")
    parser.add_argument(
        "--changed_in",
        nargs="+",
        default=[],
        metavar="RUN_DIR",
        help="finished runs of the same model: show where the n weights lie that each changed most, n being the "
        "number of salient weights",
    )
    parser.add_argument(
        "--modules",
        type=int,
        metavar="N",
        help="rank the linear layers of the trainable groups (of a LoRA recipe without any: of the language model) by "
        "their share of salient weights, and print the N best as lora_target_modules. The mask is one of the model's "
        "own weights, without an adapter",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds and describes a mask from the command line.

    Args:
        arguments: `RECIPE.yaml [--key value ...]` and the options of `build_parser`; the process's own when None.

    Returns:
        The exit status: 0, or 2 for a faulty recipe, dataset, model or run, whose faults are on stderr.
    """
    options, rest = build_parser().parse_known_args(arguments)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    try:
        make_mask(parse_recipe(rest), options.output, options.changed_in, options.modules)
    except RecipeError as err:
        if os.environ.get("RANK", "0") == "0":
            print(err, file=sys.stderr)
        return 2
    return 0


def make_mask(
    recipe: Recipe, output: str | None = None, changed_in: Sequence[str] = (), num_modules: int | None = None
) -> Distribution:
    """Builds a recipe's mask, or takes it from the cache, prints its statistics and writes them.

    Args:
        recipe: what `parse_recipe` returned; its testbed is resolved in place.
        output: folder for `saliency.md`, `.json`, `.png` and `mask.safetensors`; None for the recipe's output_dir.
        changed_in: folders of finished runs whose most changed weights are shown beside.
        num_modules: how many modules to propose for LoRA; None for no proposal.

    Returns:
        The mask's distribution.

    Raises:
        RecipeError: the recipe has no mask; data, model or one of the runs do not do.
    """
    _check(recipe, num_modules)
    if num_modules is not None and recipe.model.use_peft:
        recipe.model.use_peft = False
        recipe.training.trainable_groups = recipe.training.trainable_groups or ["language_model"]
    trainer, fingerprint = _trainer(recipe)
    try:
        trainer.prepare_saliency()
        mask = trainer.saliency_mask
        if mask.num_salient == 0 and changed_in:
            raise ValueError("No weight is salient, so there are none to compare with. Lower `saliency_threshold`.")
        changed = [most_changed_in(run, recipe, fingerprint, mask.num_salient) for run in changed_in]
        ranked = rank_modules(mask, trainer.model)[:num_modules] if num_modules is not None else []
    except (ValueError, OSError) as err:
        raise RecipeError([str(err)], recipe.source) from err
    folder = Path(output or recipe.training.output_dir)
    if not PartialState().is_main_process:
        return Distribution("", {})
    mask.save(folder / MASK_FILE)
    found = write_mask_report(recipe, trainer, folder, changed, ranked)
    _say(found, changed, ranked, folder)
    return found


def _check(recipe: Recipe, num_modules: int | None) -> None:
    """What can be told before anything is loaded."""
    faults = []
    if recipe.trainer_class is None:
        faults.append("transfer_adapter_from: a transfer trains nothing and has no mask.")
    elif recipe.training.saliency_mask is None:
        faults.append("saliency_mask: the recipe has none. Add `--saliency_mask fisher`, or `--method mmunlearner`.")
    if num_modules is not None and num_modules < 1:
        faults.append(f"--modules: at least 1, got {num_modules}.")
    if num_modules is not None and (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        faults.append("--modules: quantised weights have no gradients to rank them by. Set load_in_4bit: false.")
    if faults:
        raise RecipeError(faults, recipe.source)


def _trainer(recipe: Recipe) -> tuple[Any, str]:
    """The recipe's trainer, checked and built as a run does it, and the fingerprint of the model's weights."""
    check_launch(recipe)
    resolve_testbed(recipe)
    sets = load_streams(recipe)
    tasks, probes, bias_probe = load_tasks(recipe)
    check_leaks(recipe, sets, tasks, probes, bias_probe)
    _, processing_class = config_and_processor(recipe)
    check_collation(recipe, sets, processing_class)
    check_guidance(recipe, sets, processing_class)
    model = load_for_run(recipe, recipe.model.model_name_or_path)
    fingerprint = model_hash(model)
    sets = give_guidance(recipe, sets, model, processing_class)
    trainer, _ = build_trainer(recipe, model, processing_class, sets, [], bias_probe)
    trainer.known_weights = fingerprint
    return trainer, fingerprint


def _say(
    found: Distribution, changed: Sequence[Distribution], ranked: Sequence[tuple[str, Share]], folder: Path
) -> None:
    print(f"{density_sentence(found)}\n\n{groups_table([found, *changed])}")
    if ranked:
        print(f"\n{modules_table(ranked)}\n\n{target_modules_line([name for name, _ in ranked])}")
    print(f"\nWritten: {folder / TEXT_FILE}, {folder / MASK_FILE}")
