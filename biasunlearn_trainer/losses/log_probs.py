"""From logits to log-probabilities of tokens, of sequences, and of one policy against another.

Shapes: B sequences, T positions, V words. Log-probabilities are in nats. Results are float32, or float64 where the
input is.
"""

import torch

from biasunlearn_trainer.losses.checks import check_same_shape
from biasunlearn_trainer.losses.fused import TokenLogProbs


def upcast(values: torch.Tensor) -> torch.Tensor:
    """Return `values` in at least float32: half precision goes up, float32 and float64 pass uncopied."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def token_log_probs(logits: torch.Tensor, targets: torch.Tensor, fused: bool = True) -> torch.Tensor:
    """Return log pi(y_t | x, y_<t) = logit[y_t] - logsumexp(logits) for every target token.

    Logits and targets are already aligned: `logits[..., t, :]` predicts `targets[..., t]`; nothing is shifted here.
    No copy of the (..., V) tensor is kept for the backward pass.

    Args:
        logits: (..., V), any floating type.
        targets: (...), integer ids in [0, V); a position that a mask drops later still needs a valid id, so no -100.
        fused: go through the positions in chunks; False leaves the formula to autograd, with the same numbers in more
            memory.

    Returns:
        (...), nats, at most 0.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> token_log_probs(torch.tensor([[2.0, 2.0, 2.0, 2.0]]), torch.tensor([3]))  # log(1/4)
        tensor([-1.3863])
    """
    check_same_shape(**{"logits[..., 0]": logits[..., 0], "targets": targets})
    if fused:
        return TokenLogProbs.apply(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)).view(targets.shape)
    # Both terms come from the upcast: their gradients (softmax and minus one-hot) cancel for a confident token, and in
    # bfloat16 1 - 0.999 is 0.
    logits = upcast(logits)
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def sequence_sum(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Sum each sequence's kept tokens; of token log-probabilities this is log pi(y | x).

    Args:
        values: (B, T); what lies outside the mask is never read, NaN included.
        mask: (B, T), boolean or 0/1; nonzero keeps a token.

    Returns:
        (B,), in the unit of `values`; 0 for a sequence that keeps no token.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> sequence_sum(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
        tensor([-4.])
    """
    check_same_shape(values=values, mask=mask)
    return upcast(values).masked_fill(mask == 0, 0.0).sum(-1)


def sequence_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average each sequence over its kept tokens.

    A sequence that keeps no token gives 0 and a zero gradient, by definition and never NaN: to raise here, the GPU
    would have to be waited for at every step, so the collator is the one that refuses such rows.

    Args:
        values: (B, T); what lies outside the mask is never read, NaN included.
        mask: (B, T), boolean or 0/1; nonzero keeps a token.

    Returns:
        (B,), in the unit of `values`, per token.

    Raises:
        ValueError: if the shapes differ.

    Example:
        >>> sequence_mean(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[True, True, False]]))
        tensor([-2.])
    """
    return per_token(sequence_sum(values, mask), (mask != 0).sum(-1))


def per_token(sums: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Divide sums by token counts, shapes (B,) and (B,) or two scalars; a count of 0 counts as 1 (0 / 0 is 0 here)."""
    return upcast(sums) / lengths.clamp(min=1)


def log_ratio(policy_logps: torch.Tensor, reference_logps: torch.Tensor) -> torch.Tensor:
    """Return log(pi / ref), shape (B,), nats; no gradient flows to the reference."""
    return upcast(policy_logps) - upcast(reference_logps.detach())
