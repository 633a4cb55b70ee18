"""Gradients that reach salient weights alone, of one stream or of all.

`forget` masks what is unlearned: inside `covering()` the model runs on weights through which only salient gradients
pass, and everything else in the same step, one backward for all of it, is untouched. `update` masks the whole gradient
and puts the other weights back after every optimizer step, so that neither weight decay nor momentum moves them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import TrainerCallback

from biasunlearn_trainer.saliency.masks import SaliencyMask

SCOPES = ("forget", "update")
# Elements of a chunk: 4 MiB in float32, so that the allocator takes the same memory again.
CHUNK = 1 << 20


def salient_gradient(gradient: Tensor, salient: Tensor) -> Tensor:
    """The gradient where the mask is true, 0 elsewhere.

    On a CPU `masked_fill` falters where the mask changes from weight to weight, and a product makes a float copy of the
    mask: both take up to three times as long as products of a few rows.

    Args:
        gradient: of a weight.
        salient: bool, in its shape.
    """
    salient = salient.view(torch.uint8)  # of which floats are made faster than of bool
    if gradient.device.type != "cpu" or gradient.dim() < 2:
        return gradient * salient
    result = torch.empty_like(gradient)
    rows = max(1, CHUNK * len(gradient) // max(1, gradient.numel()))
    for start in range(0, len(gradient), rows):
        part = slice(start, start + rows)
        torch.mul(gradient[part], salient[part], out=result[part])
    return result


class SalientGradient(torch.autograd.Function):
    """A weight as it is; its gradient where the mask lets it through."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, salient: Tensor) -> Tensor:
        """`salient`: bool, in the weight's shape."""
        ctx.salient = salient
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient, 0 off the mask."""
        return salient_gradient(gradient, ctx.salient), None


class GradientMask:
    """A saliency mask at work on a model.

    Args:
        model: unwrapped, before DDP or DeepSpeed; it must be whole on every process.
        mask: covers every trainable weight.
        scope: `forget`: mask the gradient of what runs inside `covering()` (MMUnlearner eq. 3: -m * L_f + L_r);
            `update`: mask every gradient, and keep the other weights bit-identical through optimizer steps.

    Attributes:
        salient: bool by the name of a trainable weight, on its device.
    """

    def __init__(self, model: nn.Module, mask: SaliencyMask, scope: str):
        self.model, self.scope = model, scope
        parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._parameters = parameters
        self.salient = {name: mask.get(name).to(value.device) for name, value in parameters.items()}
        self._covers = False
        if scope == "forget":
            self._plain_forward = model.forward
            model.forward = self._masked_forward()
        else:
            for name, value in parameters.items():
                value.register_hook(self._hide(self.salient[name]))
            self._kept = {name: value.detach()[~self.salient[name]] for name, value in parameters.items()}

    @staticmethod
    def _hide(salient: Tensor) -> Any:
        return lambda gradient: salient_gradient(gradient, salient)

    @contextmanager
    def covering(self) -> Iterator[None]:
        """Of what the model computes inside, only salient weights get a gradient."""
        self._covers = self.scope == "forget"
        try:
            yield
        finally:
            self._covers = False

    def _masked_forward(self) -> Callable:
        """The model's forward, which inside `covering()` runs on weights with masked gradients."""

        # Wrapped, so that who asks for the signature (`generate` does) gets the model's own.
        @functools.wraps(self._plain_forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not self._covers:
                return self._plain_forward(*args, **kwargs)
            # The call below comes back here, and must then reach the model itself. Tied weights, non-reentrant
            # checkpointing and the wrappers of DDP see nothing but the usual forward pass.
            self._covers = False
            try:
                weights = {
                    name: SalientGradient.apply(value, self.salient[name]) for name, value in self._parameters.items()
                }
                return functional_call(self.model, weights, args, kwargs)
            finally:
                self._covers = True

        return forward

    def restore(self) -> None:
        """Put back the weights that are not salient; after an optimizer step in scope `update`."""
        if self.scope == "update":
            with torch.no_grad():
                for name, value in self._parameters.items():
                    value.masked_scatter_(~self.salient[name], self._kept[name])


class RestoreProtected(TrainerCallback):
    """Puts the weights that are not salient back after every optimizer step.

    Args:
        gradient_mask: in scope `update`.
    """

    def __init__(self, gradient_mask: GradientMask):
        self.gradient_mask = gradient_mask

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Runs after the step, before gradients are cleared."""
        self.gradient_mask.restore()
