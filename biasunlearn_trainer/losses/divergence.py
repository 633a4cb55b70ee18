"""How far the policy's next-token distribution moved from the reference's."""

from collections.abc import Callable
from difflib import get_close_matches

import torch

from biasunlearn_trainer.losses.checks import check_same_shape
from biasunlearn_trainer.losses.fused import TokenKL
from biasunlearn_trainer.losses.log_probs import sequence_mean, upcast

DIRECTIONS = ("forward", "reverse")


def token_kl(
    policy_logits: torch.Tensor,
    reference_logits: torch.Tensor | Callable[[slice], torch.Tensor],
    direction: str = "forward",
    fused: bool = True,
) -> torch.Tensor:
    """Return the KL divergence over the vocabulary at every position, in log space on both sides.

    Forward is KL(ref || theta) = sum_v ref (log ref - log theta): theta must cover all that the reference says.
    Reverse is KL(theta || ref). A word of probability 0 (logit -inf) in the first distribution adds 0.

    Args:
        policy_logits: (..., V), any floating type.
        reference_logits: (..., V), of the model before unlearning; it gets no gradient. Or, beside (N, V) of the
            policy, a function that returns those of a slice of the N positions, which are never there all at once then.
        direction: "forward" or "reverse".
        fused: go through the positions in chunks; False leaves the formula to autograd, with the same numbers in more
            memory.

    Returns:
        (...), nats, at least 0 up to rounding.

    Raises:
        ValueError: if the shapes differ or the direction is unknown.

    Source: KL_Min of Maini et al. 2024 (arXiv 2401.06121), forward. MMUnlearner eq. 17 prints the reverse.

    Example:
        >>> token_kl(torch.tensor([[0.0, 0.0]]), torch.tensor([[9.0, 9.0]]))  # the same distribution
        tensor([0.])
    """
    _check_direction(direction)
    if callable(reference_logits) and not fused:
        reference_logits = reference_logits(slice(None))
    if not callable(reference_logits):
        check_same_shape(policy_logits=policy_logits, reference_logits=reference_logits)
    if fused:
        *shape, width = policy_logits.shape
        if not callable(reference_logits):
            reference_logits = reference_logits.detach().reshape(-1, width).__getitem__
        return TokenKL.apply(policy_logits.reshape(-1, width), reference_logits, direction == "forward").view(shape)
    policy = upcast(policy_logits).log_softmax(-1)
    reference = upcast(reference_logits.detach()).log_softmax(-1)
    first, second = (reference, policy) if direction == "forward" else (policy, reference)
    weight = first.exp()
    return (weight * (first - second).masked_fill(weight == 0, 0.0)).sum(-1)


def kl_loss(
    policy_logits: torch.Tensor, reference_logits: torch.Tensor, mask: torch.Tensor, direction: str = "forward"
) -> torch.Tensor:
    """Return each sequence's mean of `token_kl` over its kept tokens.

    Not `kl_div(..., reduction="batchmean")`, which divides by B alone and so is T times larger on a (B, T, V) tensor.

    Args:
        policy_logits: (B, T, V), any floating type.
        reference_logits: (B, T, V), no gradient.
        mask: (B, T), boolean or 0/1; nonzero keeps a position. Leave out pads and image positions.
        direction: "forward", KL(ref || theta), or "reverse".

    Returns:
        (B,), nats per token; 0 for a sequence without a kept token (see `sequence_mean`).

    Raises:
        ValueError: if the shapes do not fit or the direction is unknown.

    Source: as `token_kl`; the reduction is MMUnlearner's, eq. 17.

    Example:
        >>> policy, reference = torch.tensor([[[0.0, 0.0]]]), torch.tensor([[[99.0, 0.0]]])
        >>> kl_loss(policy, reference, torch.tensor([[True]]))  # a certain word against a coin: log 2
        tensor([0.6931])
    """
    return sequence_mean(token_kl(policy_logits, reference_logits, direction), mask)


def _check_direction(direction: str) -> None:
    if direction not in DIRECTIONS:
        nearest = get_close_matches(str(direction).lower(), DIRECTIONS, n=1, cutoff=0.0)[0]
        raise ValueError(f"`direction` must be one of {DIRECTIONS}, got {direction!r}. Did you mean {nearest!r}?")
