"""The gradients of all rows of a batch, one by one, out of a single forward and backward pass.

A linear layer with the inputs X_b and output gradients G_b of row b has the gradient G_b^T X_b for that row. So it is
enough to see inputs and output gradients go by; autograd itself computes no gradient of a weight. Products are taken
a few rows of the matrix at a time, handed on and dropped: never does a row's gradient exist as a whole.
Goodfellow, arXiv 1510.01799; here squares need the products themselves, not only their norms.

Everything else a module may be is run again on the row's inputs alone. A weight that is used more than once (a tied
head, a layer called twice) waits until all of its uses were seen: what is squared is the sum of its gradients.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers.pytorch_utils import Conv1D

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import nll_loss
from biasunlearn_trainer.saliency.rows import InseparableRows, Layouts, head_modules

# Elements of a gradient made at a time. On a CPU they stay in the core's own cache; a GPU needs larger pieces of work.
ELEMENTS_AT_ONCE = {"cpu": 1 << 17}
ELSEWHERE_AT_ONCE = 1 << 24
_TENSOR = object()

Sink = Callable[[str, Tensor, slice], None]
"""Takes a weight's name, the gradient of one row of the batch, and of which part of the weight's first dimension."""


def pieces(weight: Tensor) -> Iterator[slice]:
    """A weight's first dimension, as much at a time as is made of its gradient at once."""
    at_once = ELEMENTS_AT_ONCE.get(weight.device.type, ELSEWHERE_AT_ONCE)
    step = max(1, at_once * len(weight) // weight.numel())
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


@dataclass
class _Use:
    """One use of a weight in a batch.

    Attributes:
        module, key: whose weight it is, and under which name.
        inputs: of each row, the module's arguments.
        gradients: of each row, that of the module's output.
    """

    module: nn.Module
    key: str
    inputs: Sequence[tuple[tuple, dict]]
    gradients: Sequence[Tensor]

    @property
    def in_parts(self) -> bool:
        """Whether a part of the gradient costs no more than its share of the whole."""
        return self.key == "weight" and type(self.module) in (nn.Linear, Conv1D, nn.Embedding)

    def gradient(self, row: int, part: slice) -> Tensor | None:
        """The gradient of a row of the batch, of a part of the weight's first dimension; None where it is 0."""
        (args, _), of_output = self.inputs[row], self.gradients[row]
        kind = type(self.module)
        if kind is nn.Embedding:
            return self._of_looked_up(args[0], of_output, part)
        if kind in (nn.Linear, Conv1D):
            flat = of_output.flatten(0, -2)
            if self.key == "bias":
                return flat.sum(0)[part]
            left, right = (flat, args[0].flatten(0, -2)) if kind is nn.Linear else (args[0].flatten(0, -2), flat)
            return left[:, part].T @ right
        return self._of_second_run(row)[part]

    def _of_looked_up(self, ids: Tensor, of_output: Tensor, part: slice) -> Tensor | None:
        inside = (ids >= part.start) & (ids < part.stop)
        if self.module.padding_idx is not None:
            inside &= ids != self.module.padding_idx
        if not inside.any():
            return None
        zeros = of_output.new_zeros(part.stop - part.start, of_output.shape[-1])
        return zeros.index_add_(0, ids[inside] - part.start, of_output[inside])

    def _of_second_run(self, row: int) -> Tensor:
        weight = self.module._parameters[self.key].detach().requires_grad_()
        args, kwargs = self.inputs[row]
        with torch.enable_grad(), weights_in_place(self.module, {self.key: weight}):
            output = self.module.forward(*args, **kwargs)  # past the hooks
        return torch.autograd.grad(output, weight, self.gradients[row])[0]


@contextmanager
def weights_in_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Tensors in place of a module's weights, by their names in it."""
    before = {key: module._parameters[key] for key in tensors}
    module._parameters.update(tensors)
    try:
        yield
    finally:
        module._parameters.update(before)


class _Seen(torch.autograd.Function):
    """A module's output as it is; its gradient is shown, together with the module's inputs, when it comes by."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, show: Callable, *inputs: Tensor) -> Tensor:
        # `anchor` asks for a gradient and gets none: it makes the backward pass come by.
        ctx.show = show
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: a checkpointed layer gives them out no second time
        ctx.show(saved, gradient)
        return gradient, None, None, *(None for _ in saved)


def row_gradients(model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str], sink: Sink) -> None:
    """Hand on the gradient of every row's mean NLL per completion token.

    Args:
        model: in eval mode, without gradients of its own; left as it was.
        batch: what `CompletionCollator` returns, with `num_images` (B,) where it has pictures.
        names: of the weights.
        sink: is handed parts of gradients, in no order, each once; a part that is 0 may be left out.

    Raises:
        InseparableRows: before anything was handed on.
    """
    watch = _Watch(model, batch, names, sink)
    with watch.watching():
        output = forward_completions(model, batch)
        watch.runs_forward = False
        loss = nll_loss(output.token_logps, output.mask).sum()
        if loss.requires_grad:  # rows of text say nothing of an image half that alone is trained
            loss.backward()
        watch.finish()


class _Watch:
    """Hooks on a model for the time of one batch."""

    def __init__(self, model: nn.Module, batch: Mapping[str, Tensor], names: Sequence[str], sink: Sink):
        self.sink, self.layouts, self.heads = sink, Layouts(batch), head_modules(model)
        parameters = dict(model.named_parameters())
        self.names = {parameters[name]: name for name in names}
        self.owners = [module for module in model.modules() if any(True for _ in self._own(module))]
        self.num_uses: Counter[str] = Counter()
        self.waiting: dict[str, list[_Use]] = {}
        self.runs_forward = True  # checkpointed layers run forward again in the backward pass: no further use
        self.anchor = torch.zeros((), requires_grad=True)

    def _own(self, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
        return (item for item in module._parameters.items() if item[1] in self.names)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks are on; autograd leaves the weights alone."""
        with ExitStack() as undo:
            for module in self.owners:
                if any(True for _ in module.children()):
                    for key, weight in self._own(module):
                        copies = self._copy_for_each_row(weight)
                        undo.enter_context(weights_in_place(module, {key: copies}))
                else:
                    undo.callback(module.register_forward_hook(self._after_forward, with_kwargs=True).remove)
            for weight in self.names:
                weight.requires_grad_(False)
                undo.callback(weight.requires_grad_, True)
            yield

    def finish(self) -> None:
        """Hands on what waits for uses whose output nobody read."""
        for name in [*self.waiting]:
            self._hand_on(name)

    def _copy_for_each_row(self, weight: nn.Parameter) -> Tensor:
        """Of a weight that lies beside modules (class or query tokens): the same with a row for each row of the batch.

        Models repeat such a weight themselves for as many rows as they see: `weight.expand(num_rows, ...)`.
        """
        if not self.layouts.one_each or not (weight.dim() == 1 or (weight.dim() == 3 and len(weight) == 1)):
            raise InseparableRows(f"{self.names[weight]} of shape {tuple(weight.shape)} cannot be had for each row")
        width = weight.shape[-1]
        copies = weight.detach().view(1, -1, width).expand(self.layouts.num_rows, -1, width).requires_grad_()

        def hand_on(copies: Tensor) -> None:
            for gradient in copies.grad:
                self.sink(self.names[weight], gradient.view(weight.shape), slice(0, len(weight)))
            copies.grad = None

        copies.register_post_accumulate_grad_hook(hand_on)
        return copies

    def _after_forward(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        leaves, structure = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        # The tensors themselves are left to autograd, which frees them when the backward pass has gone by.
        others = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        num_rows = self.layouts.num_rows
        if not isinstance(output, Tensor) or len({tensor.shape[:1] for tensor in (*tensors, output)}) != 1:
            raise InseparableRows(f"inputs and outputs of {type(module).__name__} differ in their first dimension")
        if len(output) == 1 and num_rows > 1 and self.layouts.one_each:
            # Positions are looked up once for all rows.
            output, *tensors = (tensor.expand(num_rows, *tensor.shape[1:]) for tensor in (output, *tensors))
        counts = self.layouts.of(len(output), module in self.heads)
        if self.runs_forward:
            self.num_uses.update(self.names[weight] for _, weight in self._own(module))

        def show(saved: Sequence[Tensor], gradient: Tensor) -> None:
            split = iter([tensor.split(counts) for tensor in saved])
            columns = [next(split) if leaf is _TENSOR else [leaf] * num_rows for leaf in others]
            inputs = [tree_unflatten([*row], structure) for row in zip(*columns, strict=True)]
            self._meet(module, inputs, gradient.split(counts))

        return _Seen.apply(output, self.anchor, show, *tensors)

    def _meet(self, module: nn.Module, inputs: Sequence[tuple[tuple, dict]], gradients: Sequence[Tensor]) -> None:
        for key, weight in self._own(module):
            name = self.names[weight]
            uses = self.waiting.setdefault(name, [])
            uses.append(_Use(module, key, inputs, gradients))
            if len(uses) == self.num_uses[name]:
                self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        uses = self.waiting.pop(name)
        weight = uses[0].module._parameters[uses[0].key]
        for part in pieces(weight) if all(use.in_parts for use in uses) else (slice(0, len(weight)),):
            for row in range(self.layouts.num_rows):
                found = [use.gradient(row, part) for use in uses]
                found = [gradient for gradient in found if gradient is not None]
                if found:
                    self.sink(name, sum(found[1:], start=found[0]), part)
