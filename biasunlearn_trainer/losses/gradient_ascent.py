"""Negative log-likelihood, descended to retain and ascended to forget."""

import torch

from biasunlearn_trainer.losses.log_probs import sequence_mean


def nll_loss(token_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return NLL = -(1/|y|) sum_t log pi(y_t | x, y_<t), to be minimised on what must stay.

    Args:
        token_logps: (B, T), nats.
        mask: (B, T), boolean or 0/1; nonzero marks a completion token.

    Returns:
        (B,), nats per token, at least 0; 0 for a sequence without a kept token (see `sequence_mean`).

    Raises:
        ValueError: if the shapes differ.

    Source: MMUnlearner (arXiv 2502.11051) eq. 13-14.

    Example:
        >>> nll_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]]))
        tensor([1.5000])
    """
    return -sequence_mean(token_logps, mask)


def gradient_ascent_loss(token_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return GA = -NLL = (1/|y|) sum_t log pi(y_t | x, y_<t), whose descent makes the completion less likely.

    It has no lower bound: unless something holds it back, it destroys the model after it has forgotten.

    Args:
        token_logps: (B, T), nats.
        mask: (B, T), boolean or 0/1; nonzero marks a completion token.

    Returns:
        (B,), nats per token, at most 0; 0 for a sequence without a kept token (see `sequence_mean`).

    Raises:
        ValueError: if the shapes differ.

    Source: Thudi et al. 2022 (arXiv 2109.13398). MMUnlearner eq. 15 prints NLL and says that it is maximised.

    Example:
        >>> gradient_ascent_loss(torch.tensor([[-1.0, -2.0]]), torch.tensor([[True, True]]))
        tensor([-1.5000])
    """
    return sequence_mean(token_logps, mask)
