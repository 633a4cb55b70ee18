"""Operations without values: numbers with a fraction only pretend to exist, whole numbers and truth values are real.

A forward pass reads few values: token ids, masks, where a picture stands, the sizes of a grid. All of them are whole
numbers or truth values and small. Weights and activations are large, and nobody branches on them. So the former are
computed and the latter are `FakeTensor`s of the CPU, which have a shape, a type and a size in bytes and no memory;
every operation that the real run would call is called, in the same order, on tensors of the same size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
LARGE = 1 << 22
"""Elements from which whole numbers, too, only pretend: a saliency mask has one for each weight."""
UNKNOWN_SHARE = 0.5
"""Of the elements under a mask that only pretends to exist, how many are taken to be chosen by it."""


class _OneMode(FakeTensorMode):
    """A mode that stays the same when a model is copied with its tensors, which know their mode."""

    def __deepcopy__(self, memo: dict) -> FakeTensorMode:
        return self


class Shadow(TorchDispatchMode):
    """Inside, new tensors of numbers with a fraction have no memory, and what is computed with them has none either."""

    def __init__(self):
        super().__init__()
        self.fake = _OneMode(allow_non_fake_inputs=False)

    def empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor without memory."""
        with self.fake:
            return torch.empty(*shape, dtype=dtype)

    def __torch_dispatch__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is torch.ops.prim.device.default:  # asked for more often than anything is computed
            return args[0].fake_device if isinstance(args[0], FakeTensor) else function(*args)
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        is_real = not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if is_real and (tensors or not _makes_fractions(function, args, kwargs)):
            return function(*args, **kwargs)
        if function is aten.index.Tensor and _unknown_mask(args):
            return self._some(args[0])
        if function in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            args = _without_masks(args)
        with self.fake:
            args, kwargs = tree_map_only(Tensor, self._pretend, (args, kwargs))
            result = function(*args, **kwargs)
        # The mode remembers tensors by weak references, and a tensor with one cannot change its type in place.
        self.fake.fake_tensor_converter.meta_converter.tensor_memo.clear()
        return result

    def _some(self, tensor: Tensor) -> Tensor:
        """What an unknown mask leaves of a tensor."""
        return self.empty(math.ceil(tensor.numel() * UNKNOWN_SHARE), dtype=tensor.dtype)

    def _pretend(self, tensor: Tensor) -> Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor)


def _unknown_mask(args: tuple) -> bool:
    """Whether elements are chosen by a mask over all of them that only pretends to exist."""
    tensor, indices = args[0], args[1]
    is_whole = len(indices) == 1 and indices[0].shape == tensor.shape
    return is_whole and indices[0].dtype == torch.bool and isinstance(indices[0], FakeTensor)


def _makes_fractions(function: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether an operation that is given no tensor makes one that is to be without memory."""
    meta = function(*args, **{**kwargs, "device": "meta"}) if "device" in _names(function) else None
    return meta is not None and (meta.is_floating_point() or meta.numel() >= LARGE)


def _names(function: Callable) -> set[str]:
    return {argument.name for argument in function._schema.arguments}


def _without_masks(args: tuple) -> tuple:
    """Real masks among the indices as the places where they are true: their number is a size."""
    tensor, indices, *rest = args
    places = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool and not isinstance(index, FakeTensor)
        places += index.nonzero().unbind(-1) if is_mask else [index]
    return (tensor, places, *rest)
