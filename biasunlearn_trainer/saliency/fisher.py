"""The diagonal of the Fisher information, streamed: a gradient is squared, added and freed as it is produced.

So the peak is the weights, one float32 sum, the largest single gradient and the activations of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import nll_loss


def empty_sums(model: nn.Module) -> dict[str, Tensor]:
    """float32 zeros for every trainable weight, by name, where the weight lies.

    Raises:
        ValueError: where nothing is trainable, or a weight is float16: its gradients fall below 6e-8, and their squares
            below 3e-15, to zero long before those of float32 or bfloat16.
    """
    trainable = {name: value for name, value in model.named_parameters() if value.requires_grad}
    if not trainable:
        raise ValueError("The model has no trainable weight whose saliency could be measured.")
    halves = [name for name, value in trainable.items() if value.dtype == torch.float16]
    if halves:
        raise ValueError(
            f"Saliency cannot be measured in float16: small gradients become 0, and their ratio 0/0 ({len(halves)} "
            f"weights, the first {halves[0]}). Load the model with dtype float32 or bfloat16."
        )
    return {name: torch.zeros_like(value, dtype=torch.float32) for name, value in trainable.items()}


def add_squared_gradients(model: nn.Module, batch: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add the squared gradient of a batch's loss to `sums`.

    Args:
        model: in eval mode, without gradients of its own.
        batch: what `CompletionCollator` returns; the loss is the mean over sequences of their NLL per token, in nats
            (MMUnlearner eq. 13-14). One row makes it the per-sample Fisher, several the per-batch one.
        sums: by name, changed in place.
    """
    with _squaring(model, sums):
        output = forward_completions(model, batch)
        loss = nll_loss(output.token_logps, output.mask).mean()
        if loss.requires_grad:  # rows of text say nothing of an image half that alone is trained
            loss.backward()


@contextmanager
def _squaring(model: nn.Module, sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, a gradient goes into `sums` the moment it is whole, and nowhere else."""

    def take(name: str):
        def square(parameter: Tensor) -> None:
            gradient = parameter.grad.float()
            sums[name].addcmul_(gradient, gradient)
            parameter.grad = None

        return square

    parameters = dict(model.named_parameters())
    handles = [parameters[name].register_post_accumulate_grad_hook(take(name)) for name in sums]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
