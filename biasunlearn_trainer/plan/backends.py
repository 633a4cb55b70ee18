"""How a backend spreads what a step needs over its processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from biasunlearn_trainer.plan.optimizers import OptimizerBytes, optimizer_bytes, shards
from biasunlearn_trainer.plan.trace import Step

REDUCE_BUCKET = 500_000_000
"""DeepSpeed's `reduce_bucket_size`: elements of the buffer in which ZeRO gathers gradients, allocated whole."""
LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed's `stage3_max_live_parameters`: elements of weights that ZeRO-3 holds whole at most."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one process at the fullest moment of a step.

    Attributes:
        weights: what stays of the model on the process.
        gathered: weights of others that are there for a moment.
        gradients: of the trainable weights.
        optimizer: its state, and its float32 copy of the weights where it keeps one.
        reference: a second model, or a table.
        mask: of the saliency mask.
        kept: weights that a mask of scope `update` puts back.
        activations: everything else in the forward and backward pass, or in the optimizer's step.
        buffers: of the communication.
    """

    weights: int
    gathered: int
    gradients: int
    optimizer: int
    reference: int
    mask: int
    kept: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class _Share:
    """What one process has: bytes that stay, and the part of the gradients and of a second model."""

    weights: int
    optimizer: OptimizerBytes
    master: int = 0
    gathered: int = 0
    gradients: float = 1.0
    buffers: int = 0
    reference: float = 1.0


def memory(step: Step, backend: str, processes: int, optim: str, optim_args: str | None, mixed: bool) -> Memory:
    """What one process of a backend needs.

    Args:
        step: traced on a process that holds everything itself.
        backend: `none`, `ddp`, `zero2`, `zero3` or `fsdp2`.
        processes: number of GPUs.
        optim: the optimizer's name.
        optim_args: its options.
        mixed: whether precision is mixed, for which FSDP keeps trainable weights in float32.
    """
    share = _SHARES[backend](step, processes, optim, optim_args, mixed)
    gradients, activations = _fullest(step, share)
    return Memory(
        weights=share.weights,
        gathered=share.gathered,
        gradients=gradients,
        optimizer=share.optimizer.state * (not share.optimizer.paged) + share.master,
        reference=math.ceil(share.reference * step.reference) + step.tables,
        mask=step.mask,
        kept=step.kept,
        activations=activations,
        buffers=share.buffers,
    )


def _fullest(step: Step, share: _Share) -> tuple[int, int]:
    """Gradients and activations at the moment when both together are most.

    The optimizer's step is such a moment too: all gradients are there, and what it needs for itself.
    """
    total = sum(weight.nbytes for weight in step.trainable)
    moments = [*step.levels.items(), (total, share.optimizer.step)]
    scaled = [(int(share.gradients * gradients), beside) for gradients, beside in moments]
    return max(scaled, key=sum)


def _alone(step: Step, processes: int, optim: str, optim_args: str | None, mixed: bool) -> _Share:
    return _Share(_total(step), optimizer_bytes(optim, optim_args, step.trainable))


def _ddp(step: Step, processes: int, optim: str, optim_args: str | None, mixed: bool) -> _Share:
    # The buckets in which gradients are reduced are as large as the gradients, and stay.
    buckets = sum(weight.nbytes for weight in step.trainable)
    return _Share(_total(step), optimizer_bytes(optim, optim_args, step.trainable), buffers=buckets)


def _zero2(step: Step, processes: int, optim: str, optim_args: str | None, mixed: bool) -> _Share:
    parts = shards(step.trainable, processes)
    return _Share(
        weights=_total(step),
        optimizer=optimizer_bytes(optim, optim_args, parts),
        master=sum(part.nbytes for part in parts),
        gradients=1 / processes,
        buffers=REDUCE_BUCKET * _itemsize(step),
    )


def _zero3(step: Step, processes: int, optim: str, optim_args: str | None, mixed: bool) -> _Share:
    parts = shards(step.trainable, processes)
    live = min(sum(weight.numel for weight in step.weights), LIVE_PARAMETERS)
    return _Share(
        weights=_part(step, processes),
        optimizer=optimizer_bytes(optim, optim_args, parts),
        master=sum(part.nbytes for part in parts),
        gathered=live * _itemsize(step),
        gradients=1 / processes,
        buffers=REDUCE_BUCKET * _itemsize(step),
        reference=1 / processes,
    )


def _fsdp2(step: Step, processes: int, optim: str, optim_args: str | None, mixed: bool) -> _Share:
    in_float32 = sum((4 - weight.dtype.itemsize) * weight.numel for weight in step.trainable) if mixed else 0
    parts = shards(step.trainable, processes) if mixed else _parts(step, processes)
    root, *blocks = step.blocks
    # What is in no block stays gathered through the step; of the blocks, one is computed while the next one comes.
    gathered = (root + sum(sorted(blocks)[-2:])) * _itemsize(step)
    return _Share(
        weights=_part(step, processes) + math.ceil(in_float32 / processes),
        optimizer=optimizer_bytes(optim, optim_args, parts),
        gathered=gathered,
        gradients=(4 / _itemsize(step) if mixed else 1) / processes,
    )


_SHARES: dict[str, Callable[..., _Share]] = {
    "none": _alone,
    "ddp": _ddp,
    "zero2": _zero2,
    "zero3": _zero3,
    "fsdp2": _fsdp2,
}


def _total(step: Step) -> int:
    return sum(weight.nbytes for weight in step.weights)


def _part(step: Step, processes: int) -> int:
    return math.ceil(_total(step) / processes)


def _parts(step: Step, processes: int) -> Sequence:
    return [type(weight)((math.ceil(weight.numel / processes),), weight.dtype, True) for weight in step.trainable]


def _itemsize(step: Step) -> int:
    """Bytes of an element of most weights."""
    sizes: dict[int, int] = {}
    for weight in step.weights:
        if weight.dtype.is_floating_point:
            sizes[weight.dtype.itemsize] = sizes.get(weight.dtype.itemsize, 0) + weight.numel
    return max(sizes, key=sizes.get) if sizes else 4
