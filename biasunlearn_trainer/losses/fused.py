"""Log-probabilities and divergences whose intermediate values are never whole: a few positions at a time.

Over N positions and V words autograd keeps three to six (N, V) tensors in at least float32 for such a loss. Here the
forward pass goes through the positions in chunks, and what the backward pass needs is a single (N, V) tensor in the
logits' own type. Values and gradients are those of the plain formulas.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Elements of a chunk. On a CPU a chunk stays in the core's own cache, which halves the time; a GPU needs larger pieces.
CHUNK = {"cpu": 1 << 17}
ELSEWHERE = 1 << 22
# Positions for which a reference's logits are computed at once, at least. For each piece its head reads all of its
# weights: 4 positions at a time take five times as long as 64 (32,000 words, width 256, a CPU).
REFERENCE_POSITIONS = 64


def chunks(logits: Tensor, at_least: int = 1) -> Iterator[slice]:
    """The (N, V) logits' positions in pieces of about `CHUNK` elements."""
    num_positions, num_words = logits.shape
    step = max(at_least, CHUNK.get(logits.device.type, ELSEWHERE) // max(1, num_words))
    for start in range(0, num_positions, step):
        yield slice(start, min(start + step, num_positions))


def _beside(policy: Tensor, reference: Callable[[slice], Tensor]) -> Iterator[tuple[slice, Tensor]]:
    """The (N, V) policy's positions in pieces, and the reference's logits at each."""
    for block in chunks(policy, REFERENCE_POSITIONS):
        given = reference(block)
        for rows in chunks(given):
            yield slice(block.start + rows.start, block.start + rows.stop), given[rows]


def _upcast(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def normaliser(logits: Tensor) -> Tensor:
    """(N,) logsumexp of (N, V) logits, in at least float32."""
    found = logits.new_empty(len(logits), dtype=torch.promote_types(logits.dtype, torch.float32))
    for rows in chunks(logits):
        found[rows] = _upcast(logits[rows]).logsumexp(-1)
    return found


class TokenLogProbs(torch.autograd.Function):
    """log pi(y_t) = logit[y_t] - logsumexp(logits); the logits' gradient is one-hot(y_t) - softmax."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        """`logits` (N, V), `targets` (N,); returns (N,) in at least float32."""
        picked = _upcast(logits.gather(-1, targets[:, None]).squeeze(-1))
        normalisers = normaliser(logits)
        ctx.save_for_backward(logits, targets, normalisers)
        return picked - normalisers

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        """Softmax and one-hot cancel for a confident token, so they are taken apart before they are rounded."""
        logits, targets, normalisers = ctx.saved_tensors
        found = torch.empty_like(logits)
        for rows in chunks(logits):
            weight = grad[rows, None]
            part = (_upcast(logits[rows]) - normalisers[rows, None]).exp_().mul_(-weight)
            found[rows] = part.scatter_add_(-1, targets[rows, None], weight)
        return found, None


class TokenKL(torch.autograd.Function):
    """KL(ref || theta), or KL(theta || ref), with its gradient found on the way.

    The gradient to theta's logits is theta - ref, or theta (log theta - log ref - KL). A position's KL is one number:
    its gradient is kept ready and multiplied by what comes down to it, and the reference's logits are needed only once.
    """

    @staticmethod
    def forward(ctx, policy: Tensor, reference: Callable[[slice], Tensor], is_forward: bool) -> Tensor:
        """`policy` (N, V) logits, `reference` the logits of a slice of positions; returns (N,) in at least float32."""
        keeps = ctx.needs_input_grad[0]
        values = policy.new_empty(len(policy), dtype=torch.promote_types(policy.dtype, torch.float32))
        gradient = torch.empty_like(policy) if keeps else None
        for rows, other in _beside(policy, reference):
            own, other = (_upcast(part).log_softmax(-1) for part in (policy[rows], other))
            first, second = (other, own) if is_forward else (own, other)
            weight = first.exp()
            gap = (first - second).masked_fill_(weight == 0, 0.0)
            values[rows] = (weight * gap).sum(-1)
            if keeps and is_forward:
                gradient[rows] = own.exp_().sub_(weight)
            elif keeps:
                gradient[rows] = gap.sub_(values[rows, None]).mul_(weight)
        if keeps:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        """What comes down to a position's KL, times the gradient that was kept."""
        (gradient,) = ctx.saved_tensors
        return gradient * grad[:, None].to(gradient.dtype), None, None
