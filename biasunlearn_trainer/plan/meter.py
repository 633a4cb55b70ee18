"""Bytes of the tensors that are alive, as operations make and free them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TensorBytes(TorchDispatchMode):
    """Bytes of all storages alive, and their peak, from the first operation inside on.

    Real tensors count, and those that only pretend to have values. What an operation allocates and frees inside itself
    is not seen.

    Args:
        known: tensors that are there at the beginning.

    Attributes:
        now: bytes alive.
        peak: most bytes alive so far.

    Example:
        >>> weight = torch.zeros(1000)
        >>> with TensorBytes(weight) as meter:
        ...     doubled = weight * 2
        >>> meter.peak
        8000
    """

    def __init__(self, *known: Tensor):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._meet(tensor)

    def _meet(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.alive:
            self.alive[storage._cdata] = storage.nbytes()
            self.now += storage.nbytes()
            self._grown()
            weakref.finalize(storage, self._part, storage._cdata)

    def _part(self, key: int) -> None:
        self.now -= self.alive.pop(key, 0)

    def _grown(self) -> None:
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.namespace == "prim":  # a question, such as that for the device
            return result
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._meet(leaf)
        return result


class StepBytes(TensorBytes):
    """Bytes alive in a training step, the gradients of weights apart from everything else.

    Args:
        model: its weights are there at the beginning, and are counted for themselves.

    Attributes:
        steady: bytes at the beginning.
        levels: by the bytes of the weights' gradients that were alive, the most bytes of all that came in beside them.
    """

    def __init__(self, model: nn.Module, others: Iterable[Tensor] = ()):
        self.gradients, self.levels, self.steady = 0, {}, None
        super().__init__(*model.parameters(), *model.buffers(), *others)
        self.steady = self.now
        self._hooks = [
            weight.register_post_accumulate_grad_hook(self._arrived)
            for weight in model.parameters()
            if weight.requires_grad
        ]
        self._counted: set[int] = set()

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that come in from outside, such as a batch."""
        for tensor in tensors:
            self._meet(tensor)

    def _arrived(self, weight: nn.Parameter) -> None:
        if id(weight) not in self._counted:
            self._counted.add(id(weight))
            self.gradients += weight.grad.untyped_storage().nbytes()
            self._grown()

    def _grown(self) -> None:
        super()._grown()
        if self.steady is not None:
            beside = self.now - self.steady - self.gradients
            self.levels[self.gradients] = max(self.levels.get(self.gradients, 0), beside)

    def close(self) -> None:
        """Takes the hooks off the weights."""
        for hook in self._hooks:
            hook.remove()
