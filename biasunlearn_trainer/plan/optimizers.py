"""What an optimizer keeps for each weight, and what its step needs for a moment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from biasunlearn_trainer.plan.trace import Weight

BLOCK_8BIT, SMALLEST_8BIT = 256, 4096
"""bitsandbytes: elements that share a float32 scale, and elements below which a state stays in float32."""


def _as_weights(number: int) -> Callable[[Weight], int]:
    return lambda weight: number * weight.nbytes


def _as_float32(number: int) -> Callable[[Weight], int]:
    return lambda weight: number * 4 * weight.numel


def _as_8bit(number: int) -> Callable[[Weight], int]:
    def size(weight: Weight) -> int:
        if weight.numel < SMALLEST_8BIT:
            return number * 4 * weight.numel
        return number * (weight.numel + 4 * math.ceil(weight.numel / BLOCK_8BIT))

    return size


def _factored(weight: Weight) -> int:
    """Adafactor without a first moment: a row and a column of float32 in place of each matrix."""
    *outer, rows, columns = weight.shape if len(weight.shape) > 1 else (1, 1, 1)
    return 4 * (math.prod(outer) * (rows + columns) if len(weight.shape) > 1 else weight.numel)


STATES: dict[str, Callable[[Weight], int]] = {
    "adamw_torch": _as_weights(2),
    "adamw_torch_fused": _as_weights(2),
    "sgd": _as_weights(0),
    "adagrad": _as_weights(1),
    "rmsprop": _as_weights(1),
    "adafactor": _factored,
    "adamw_bnb_8bit": _as_8bit(2),
    "adamw_8bit": _as_8bit(2),
    "paged_adamw_8bit": _as_8bit(2),
    "paged_adamw_32bit": _as_float32(2),
    "lion_32bit": _as_float32(1),
    "paged_lion_32bit": _as_float32(1),
    "lion_8bit": _as_8bit(1),
    "paged_lion_8bit": _as_8bit(1),
    "ademamix": _as_float32(3),
    "paged_ademamix_32bit": _as_float32(3),
    "ademamix_8bit": _as_8bit(3),
    "paged_ademamix_8bit": _as_8bit(3),
    "rmsprop_bnb": _as_float32(1),
    "rmsprop_bnb_32bit": _as_float32(1),
    "rmsprop_bnb_8bit": _as_8bit(1),
}
"""Bytes of state by weight, for each `optim`. PyTorch's own keep it in the weight's precision."""


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer needs.

    Attributes:
        state: kept from the first step on.
        step: for a moment in each step.
        paged: whether the state lies in memory that moves between CPU and GPU.
        known: whether these are the optimizer's own sizes; else those of AdamW stand in for them.
    """

    state: int
    step: int
    paged: bool
    known: bool


def optimizer_bytes(name: str, options: str | None, weights: Iterable[Weight]) -> OptimizerBytes:
    """The bytes that an optimizer needs for the trainable weights.

    Args:
        name: `optim` of the recipe.
        options: its `optim_args`; a momentum gives SGD and RMSprop another state.
        weights: the trainable ones.
    """
    weights = list(weights)
    size = STATES.get(name, STATES["adamw_torch"])
    state = sum(size(weight) for weight in weights)
    if name in ("sgd", "rmsprop") and "momentum" in (options or ""):
        state += sum(weight.nbytes for weight in weights)
    return OptimizerBytes(state, _step_bytes(name, weights), name.startswith("paged_"), name in STATES)


def _step_bytes(name: str, weights: list[Weight]) -> int:
    """Fused kernels need nothing beside the state; PyTorch's others run over all weights at once."""
    if name in ("adamw_torch", "adagrad", "rmsprop"):
        return sum(weight.nbytes for weight in weights)
    if name == "adafactor":  # weight by weight: the squared gradient, the update, and the gradient in float32
        return 3 * 4 * max((weight.numel for weight in weights), default=0)
    return 0


def shards(weights: Iterable[Weight], processes: int) -> list[Weight]:
    """The weights as optimizers that are shared out see them: float32, flat, a part on each process."""
    return [Weight((math.ceil(weight.numel / processes),), torch.float32, True) for weight in weights]
