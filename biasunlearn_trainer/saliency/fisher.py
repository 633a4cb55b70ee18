"""The diagonal of the Fisher information, streamed: a gradient is squared, added and freed as it is produced.

So the peak is the weights, one float32 sum, the largest single gradient and the activations of one micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import nll_loss
from biasunlearn_trainer.saliency.per_sample import Sink, row_gradients
from biasunlearn_trainer.saliency.rows import InseparableRows

logger = logging.getLogger(__name__)

# Largest relative difference of a weight's summed squares, all at once and row by row. Rounding stays far below; rows
# that were mixed up, or a use of the weight that was overlooked, far above.
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-3, torch.bfloat16: 0.1}
# Gradients that are 0 but for rounding (biases of keys) need not agree: their mean square is below this share of the
# largest one of all weights.
NEGLIGIBLE = {torch.float32: 1e-9, torch.float64: 1e-9, torch.bfloat16: 1e-5}


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


def adding_to(sums: Mapping[str, Tensor]) -> Sink:
    """A sink that adds squares to `sums`."""

    def add(name: str, gradient: Tensor, part: slice) -> None:
        gradient = gradient.float()
        sums[name][part].addcmul_(gradient, gradient)

    return add


def add_squared_gradients(model: nn.Module, batch: Mapping[str, Tensor], sums: Mapping[str, Tensor]) -> None:
    """Add the squared gradient of a batch's loss to `sums`.

    Args:
        model: in eval mode, without gradients of its own.
        batch: what `CompletionCollator` returns; the loss is the mean over sequences of their NLL per token, in nats
            (MMUnlearner eq. 13-14). One row makes it the per-sample Fisher, several the per-batch one.
        sums: by name, changed in place.
    """
    _batch_gradient(model, batch, [*sums], adding_to(sums))


def _batch_gradient(model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str], sink: Sink) -> None:
    with _handing_on(model, names, sink):
        output = forward_completions(model, batch)
        loss = nll_loss(output.token_logps, output.mask).mean()
        if loss.requires_grad:  # rows of text say nothing of an image half that alone is trained
            loss.backward()


@contextmanager
def _handing_on(model: nn.Module, names: Sequence[str], sink: Sink) -> Iterator[None]:
    """Inside, a gradient goes into `sink` the moment it is whole, and nowhere else."""

    def take(name: str):
        def hand_on(parameter: Tensor) -> None:
            sink(name, parameter.grad, slice(None))
            parameter.grad = None

        return hand_on

    parameters = dict(model.named_parameters())
    handles = [parameters[name].register_post_accumulate_grad_hook(take(name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PerSampleFisher:
    """Adds the squared gradient of every row's loss to sums: several rows at once where that is exact.

    The first rows of each modality are taken both ways. Where what comes out differs (a model with layers unknown here,
    which use weights past their modules or mix rows), rows of that modality are taken one by one, and the log says so.

    Args:
        model: in eval mode, without gradients of its own.
        collate: from rows to a batch, with `num_images` (B,), on the model's device.
        sums: by name, changed in place.
    """

    def __init__(
        self,
        model: nn.Module,
        collate: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]],
        sums: Mapping[str, Tensor],
    ):
        self.model, self.collate, self.sums = model, collate, sums
        self._at_once: dict[bool, bool] = {}  # by modality, once it was tried

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take rows that all have pictures or all have none."""
        if len(rows) == 1:
            return self._one_by_one(rows, adding_to(self.sums))
        batch = self.collate(rows)
        pictured = "pixel_values" in batch
        if pictured not in self._at_once:
            self._at_once[pictured] = self._try(rows, batch)
        elif not self._at_once[pictured]:
            self._one_by_one(rows, adding_to(self.sums))
        else:
            try:
                row_gradients(self.model, batch, [*self.sums], adding_to(self.sums))
            except InseparableRows:  # sizes that happen to coincide
                self._one_by_one(rows, adding_to(self.sums))

    def _one_by_one(self, rows: Sequence[Mapping[str, Any]], sink: Sink) -> None:
        for row in rows:
            _batch_gradient(self.model, self.collate([row]), [*self.sums], sink)

    def _try(self, rows: Sequence[Mapping[str, Any]], batch: Mapping[str, Tensor]) -> bool:
        """Take the first rows one by one, and see whether all at once gives the same."""
        add, expected, found = adding_to(self.sums), _SquaredNorms(self.sums), _SquaredNorms(self.sums)

        def both(name: str, gradient: Tensor, part: slice) -> None:
            add(name, gradient, part)
            expected(name, gradient, part)

        self._one_by_one(rows, both)
        try:
            row_gradients(self.model, batch, [*self.sums], found)
        except torch.OutOfMemoryError:
            raise
        except (InseparableRows, RuntimeError, TypeError) as err:  # the latter from layers that copies do not fit
            reason = str(err).splitlines()[0]
        else:
            differing = expected.differing(found, self.model)
            if not differing:
                return True
            reason = f"{len(differing)} weights would get other values, the first {differing[0]}"
        logger.warning("Fisher: rows are taken one by one, several times slower than in batches: %s.", reason)
        return False


class _SquaredNorms:
    """A sink that keeps one number of each weight: the sum of all squares."""

    def __init__(self, sums: Mapping[str, Tensor]):
        self.values = {name: torch.zeros((), device=value.device) for name, value in sums.items()}
        self.sizes = {name: value.numel() for name, value in sums.items()}

    def __call__(self, name: str, gradient: Tensor, part: slice) -> None:
        self.values[name] += gradient.float().square().sum()

    def differing(self, other: _SquaredNorms, model: nn.Module) -> list[str]:
        """Names of weights whose number is another one in `other`, beyond rounding."""
        dtypes = {name: value.dtype for name, value in model.named_parameters()}
        largest = max(float(value) / self.sizes[name] for name, value in self.values.items())
        return [
            name
            for name, value in self.values.items()
            # Written so that what is no number differs.
            if not abs(float(value) - float(other.values[name]))
            <= AGREEMENT[dtypes[name]] * float(value) + NEGLIGIBLE[dtypes[name]] * largest * self.sizes[name]
        ]
