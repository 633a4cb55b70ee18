"""Peak memory of a step: bytes of tensors, weights and all that is held beside them included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from steps import Step

from biasunlearn_trainer.plan.meter import TensorBytes

MIB = 2**20


@dataclass(frozen=True)
class Peak:
    """Bytes.

    Attributes:
        total: the most that is alive at a time.
        over_weights: the same without the weights of the policy; those of a second model are in it.
    """

    total: int
    over_weights: int


def peak(step: Step, device: str) -> Peak:
    """Takes the step once and watches.

    On a CPU operations are watched as they make and free tensors; on a GPU the allocator is asked, and what other cases
    hold is taken off.
    """
    weights = storages([*step.model.parameters(), *step.model.buffers()])
    beside = {key: size for key, size in storages([*step.held, *step.batch]).items() if key not in weights}
    held = sum(weights.values()) + sum(beside.values())
    if device == "cpu":
        with TensorBytes(*step.model.parameters(), *step.model.buffers(), *step.held, *step.batch) as meter:
            step()
        total = meter.peak
    else:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        total = held + torch.cuda.max_memory_allocated() - before
    return Peak(total, total - sum(weights.values()))


def storages(tensors: list[torch.Tensor]) -> dict[int, int]:
    """Bytes by storage, each once."""
    parts = [tensor.untyped_storage() for tensor in tensors]
    return {part._cdata: part.nbytes() for part in parts}
