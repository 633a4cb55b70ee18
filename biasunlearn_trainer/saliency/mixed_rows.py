"""One pass over rows of which the first have their gradients masked and the others have not.

A weight's gradient is a sum over rows, so it can be had in two parts, of which one goes through the mask. A linear
layer takes two products in its backward pass, m * (G_1^T X_1) + G_2^T X_2, together as large as the one it would take;
an embedding masks what comes down to a token; every other module, norms above all, runs on the two parts by itself.
All that lies between the weights sees one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from transformers.pytorch_utils import Conv1D

from biasunlearn_trainer.saliency.gradients import SalientGradient
from biasunlearn_trainer.saliency.per_sample import pieces, weights_in_place
from biasunlearn_trainer.saliency.rows import InseparableRows, Layouts, head_modules


class MixedRows:
    """A model's modules while rows go through it whose first ones have their gradients masked.

    Args:
        model: unwrapped; no layer is checkpointed.
        salient: bool masks by the name of a trainable weight.
        batch: what `CompletionCollator` returns, without pictures.
        num_masked: how many of its rows.
    """

    def __init__(self, model: nn.Module, salient: Mapping[str, Tensor], batch: Mapping[str, Tensor], num_masked: int):
        self.model, self.salient, self.num_masked = model, salient, num_masked
        self.num_rows, self.length = batch["input_ids"].shape
        self.layouts, self.heads = Layouts(batch), head_modules(model)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, what the model computes for the batch gets its gradients so.

        Raises:
            InseparableRows: from the forward pass, where a module is called on something else than rows, tokens or
                completion tokens, or a weight is used outside of a module that has nothing but weights.
        """
        names = {value: name for name, value in self.model.named_parameters()}
        with ExitStack() as undo:
            for module in self.model.modules():
                own = {key: value for key, value in module._parameters.items() if names.get(value) in self.salient}
                if own:
                    elsewhere = {key: _Elsewhere(value) for key, value in own.items()}
                    undo.enter_context(weights_in_place(module, elsewhere))
                    if not any(True for _ in module.children()):
                        masks = {key: self.salient[names[value]] for key, value in own.items()}
                        undo.enter_context(self._forward_in_place(module, own, masks))
            yield

    @contextmanager
    def _forward_in_place(
        self, module: nn.Module, own: dict[str, nn.Parameter], masks: dict[str, Tensor]
    ) -> Iterator[None]:
        """A module's forward as it runs on mixed rows."""
        plain, of_instance = module.forward, "forward" in vars(module)
        run = self._product if type(module) in (nn.Linear, Conv1D, nn.Embedding) else self._each_part
        module.forward = partial(run, module, plain, own, masks)
        try:
            yield
        finally:
            if of_instance:
                module.forward = plain
            else:
                del module.forward

    def _product(self, module: nn.Module, plain: Callable, own: dict, masks: dict, *args: Any, **kwargs: Any) -> Tensor:
        (inputs,) = (*args, *kwargs.values())
        if isinstance(module, nn.Embedding) and inputs.shape == (1, self.length):
            inputs = inputs.expand(self.num_rows, -1)  # positions are looked up once for all rows
        call = _Call(module, plain, masks, self._num_first(module, inputs))
        with weights_in_place(module, own):
            return _Product.apply(call, inputs, module.weight, *own.values())

    def _each_part(
        self, module: nn.Module, plain: Callable, own: dict, masks: dict, *args: Any, **kwargs: Any
    ) -> Tensor:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        first = {self._num_first(module, tensor) for tensor in tensors}
        if len(first) != 1:
            raise InseparableRows(f"inputs of {type(module).__name__} are of different rows")
        masked = {key: SalientGradient.apply(value, masks[key]) for key, value in own.items()}
        outputs = []
        for weights, part in ((masked, slice(*first)), (own, slice(*first, None))):
            part_args, part_kwargs = tree_map_only(Tensor, lambda tensor, part=part: tensor[part], (args, kwargs))
            with weights_in_place(module, weights):
                outputs.append(plain(*part_args, **part_kwargs))
        if not all(isinstance(output, Tensor) for output in outputs):
            raise InseparableRows(f"{type(module).__name__} returns more than a tensor")
        return torch.cat(outputs)

    def _num_first(self, module: nn.Module, activation: Tensor) -> int:
        """How many entries along the first dimension are those of masked rows."""
        of_tokens = module in self.heads and activation.dim() == 2  # as many as rows, if each completion is one token
        leading = activation.shape[:2]
        if not leading or (leading[0] == self.num_rows and leading != (self.num_rows, self.length) and not of_tokens):
            raise InseparableRows(f"{type(module).__name__} is called on entries that may not be rows")
        return sum(self.layouts.of(len(activation), module in self.heads)[: self.num_masked])


class _Elsewhere(Tensor):
    """What stands for a weight outside of its module, where rows cannot be told apart: shape and type, no values."""

    @staticmethod
    def __new__(cls, weight: Tensor) -> _Elsewhere:
        return Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> None:
        raise InseparableRows("the model has weights beside modules, or uses a module's without calling it")


@dataclass
class _Call:
    """A linear layer or an embedding at work on mixed rows.

    Attributes:
        module: the layer.
        forward: as it was.
        masks: bool, of its trained weights.
        num_first: entries along the first dimension of an activation that belong to masked rows.
    """

    module: nn.Module
    forward: Callable
    masks: Mapping[str, Tensor]
    num_first: int

    def input_gradient(self, weight: Tensor, gradient: Tensor) -> Tensor:
        """(..., in) given the output's gradient (..., out)."""
        weight = weight.to(gradient.dtype)
        return gradient @ (weight.T if type(self.module) is Conv1D else weight)

    def weight_gradients(self, inputs: Tensor, gradient: Tensor) -> list[Tensor]:
        """Of each trained weight, given inputs (..., in), or ids, and the output's gradient (..., out)."""
        if type(self.module) is nn.Embedding:
            return [self._of_looked_up(inputs, gradient)]
        halves = (slice(self.num_first), slice(self.num_first, None))
        left, right = ([x[half].flatten(0, -2) for half in halves] for x in (gradient, inputs.to(gradient.dtype)))
        if type(self.module) is Conv1D:
            left, right = right, left
        return [
            gradient[halves[0]].flatten(0, -2).sum(0) * mask + gradient[halves[1]].flatten(0, -2).sum(0)
            if key == "bias"
            else self._of_products(left, right, mask)
            for key, mask in self.masks.items()
        ]

    def _of_products(self, left: list[Tensor], right: list[Tensor], mask: Tensor) -> Tensor:
        found = left[0].new_empty(mask.shape)
        salient = mask.view(torch.uint8)  # of which floats are made faster than of bool
        for part in pieces(found):
            torch.mm(left[0][:, part].T, right[0], out=found[part])
            found[part].mul_(salient[part]).addmm_(left[1][:, part].T, right[1])
        return found

    def _of_looked_up(self, ids: Tensor, gradient: Tensor) -> Tensor:
        """Mask times the sum of a word's gradients is the sum of its mask times each of them."""
        first, others = gradient[: self.num_first], gradient[self.num_first :]
        masked = torch.cat([first * self.masks["weight"][ids[: self.num_first]], others])
        layer = self.module
        padding = -1 if layer.padding_idx is None else layer.padding_idx
        return torch.ops.aten.embedding_dense_backward(
            masked, ids, layer.num_embeddings, padding, layer.scale_grad_by_freq
        )


class _Product(torch.autograd.Function):
    """What a `_Call` computes; its weights' gradients are those of mixed rows."""

    @staticmethod
    def forward(ctx: Any, call: _Call, inputs: Tensor, weight: Tensor, *trained: Tensor) -> Tensor:
        """`weight`: the layer's, trained or not."""
        ctx.call = call
        ctx.save_for_backward(inputs, weight)
        return call.forward(inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Of the inputs and the trained weights."""
        inputs, weight = ctx.saved_tensors
        of_inputs = ctx.call.input_gradient(weight, gradient) if ctx.needs_input_grad[1] else None
        return None, of_inputs, None, *ctx.call.weight_gradients(inputs, gradient)
