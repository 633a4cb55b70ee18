"""Does the way a run was launched fit its recipe? Said before a model is loaded."""

from __future__ import annotations

import logging
import os

from accelerate.utils import DistributedType

from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.sharding import FSDP_VARIABLE, is_fsdp, is_sharded

logger = logging.getLogger(__name__)


def check_launch(recipe: Recipe) -> None:
    """Refuses what cannot work, and says where the launch turned out other than it was asked for.

    Raises:
        RecipeError: with all faults at once.
    """
    notice_fallback(recipe)
    if faults := [*_world_faults(recipe), *_precision_faults(recipe), *backend_faults(recipe)]:
        raise RecipeError(faults, recipe.source)


def backend_faults(recipe: Recipe) -> list[str]:
    """What the recipe asks for that the backend cannot do."""
    return [fault for check in (_quantisation_faults, _probe_faults, _mask_faults) for fault in check(recipe)]


def notice_fallback(recipe: Recipe) -> None:
    """Says where accelerate put plain DDP in the place of FSDP, as it does on a CPU without a word."""
    found = recipe.training.distributed_state.distributed_type
    if is_fsdp() and found != DistributedType.FSDP and recipe.training.device.type == "cpu":
        logger.warning(
            "FSDP was asked for, but there is none on a CPU: this run is plain DDP (%s), with a whole model in each of "
            "the %d processes.",
            found.value,
            recipe.training.world_size,
        )
        os.environ.pop(FSDP_VARIABLE)


def _world_faults(recipe: Recipe) -> list[str]:
    """Every process alone, each training a model of its own: the silent failure of a wrong launch."""
    launched, seen = int(os.environ.get("WORLD_SIZE", 1)), recipe.training.world_size
    hint = "On a CPU, DeepSpeed needs `use_cpu: true` in the recipe."
    return [f"{launched} processes were launched, each sees {seen}. {hint}"] if launched != seen else []


def _precision_faults(recipe: Recipe) -> list[str]:
    launched, given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), recipe.given
    for own, other in (("bf16", "fp16"), ("fp16", "bf16")):
        off = given.get(own) is False or given.get(other)
        if launched == own and off:
            said = f"`{other}: true`" if given.get(other) else f"`{own}: false`"
            return [
                f"the accelerate config says mixed_precision {own}, the recipe {said}. Launch with --mixed_precision "
                f"{other if given.get(other) else 'no'}, or change the recipe."
            ]
    return []


def _quantisation_faults(recipe: Recipe) -> list[str]:
    if is_sharded() and (recipe.model.load_in_4bit or recipe.model.load_in_8bit):
        key = "load_in_4bit" if recipe.model.load_in_4bit else "load_in_8bit"
        return [
            f"`{key}`: quantised weights cannot be sharded here (ZeRO-3, FSDP). Launch with ddp.yaml or zero2.yaml, "
            "which keep the small model whole on each GPU, or leave it out."
        ]
    return []


def _probe_faults(recipe: Recipe) -> list[str]:
    if not is_fsdp():
        return []
    return [
        f"`{key}`: what FSDP shards cannot be measured in training. Launch with zero3.yaml or ddp.yaml, or drop it."
        for key in ("probes", "bias_probe")
        if getattr(recipe.run, key)
    ]


def _mask_faults(recipe: Recipe) -> list[str]:
    try:
        if recipe.trainer_class is not None:
            recipe.trainer_class.check_masking(recipe.training)
    except ValueError as err:
        return [str(err)]
    return []
