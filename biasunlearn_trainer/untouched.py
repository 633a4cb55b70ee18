"""Weights that a micro-batch leaves out, and why DDP has to hear of them.

DDP averages the gradients of all trainable weights and waits until each has one. A micro-batch of text alone gives the
image half of a model none. DDP's own search for such weights (`find_unused_parameters`) looks at one forward pass at a
time; with two before one backward pass, pictures to forget and text to retain, it ticks weights off that the other pass
did use. So the search is made here, once for each combination of streams, in the graph of the whole loss. One process
does the same, so that a weight without a gradient is moved by the optimizer's momentum in both cases, as under ZeRO.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn


class UntouchedWeights:
    """Gives the weights that a loss does not reach a gradient of zero.

    Args:
        model: the one that is trained; its weights are whole on every process.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._untouched: dict[Hashable, list[nn.Parameter]] = {}

    def complete(self, loss: Tensor, kind: Hashable) -> Tensor:
        """The same loss with every trainable weight in its graph.

        Args:
            loss: 0-dimensional, with a graph.
            kind: what decides which weights are reached; losses of a kind are searched once.
        """
        if kind not in self._untouched:
            reached = reached_leaves(loss)
            trainable = (weight for weight in self.model.parameters() if weight.requires_grad)
            self._untouched[kind] = [weight for weight in trainable if id(weight) not in reached]
        for weight in self._untouched[kind]:
            loss = loss + 0 * weight.flatten()[0].to(loss.dtype)
        return loss


def reached_leaves(loss: Tensor) -> set[int]:
    """The `id`s of the leaf tensors that get a gradient when `loss.backward()` is called."""
    found: set[int] = set()
    seen: set[torch.autograd.graph.Node] = set()
    waiting = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        waiting += [parent for parent, _ in node.next_functions]
    return found
