"""Preference optimisation with a chosen completion: a refusal or an unbiased answer over the biased one."""

import torch
from torch.nn.functional import logsigmoid

from biasunlearn_trainer.losses.checks import check_beta, check_per_sequence
from biasunlearn_trainer.losses.log_probs import log_ratio


def dpo_loss(
    policy_chosen: torch.Tensor,
    policy_rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """Return DPO = -log sigmoid(beta [log(pi/ref)(chosen) - log(pi/ref)(rejected)]).

    Without the chosen term, and times 2/beta, this is `npo_loss` of the rejected completion.

    Args:
        policy_chosen: (B,), log pi(chosen | x) summed over completion tokens, nats.
        policy_rejected: (B,), the same for the rejected (biased) completion.
        reference_chosen: (B,), the chosen completion under the model before unlearning; no gradient.
        reference_rejected: (B,), the rejected one under the same model; no gradient.
        beta: inverse temperature, > 0, per nat.

    Returns:
        (B,), at least 0; log 2 where the policies agree.

    Raises:
        ValueError: if a shape is not (B,) or beta is not positive.

    Source: Rafailov et al. 2023 (arXiv 2305.18290) eq. 7, beta 0.1; with refusals as chosen: Maini et al. 2024
        (arXiv 2401.06121).

    Example:
        >>> same = torch.tensor([-5.0])
        >>> dpo_loss(same, same, same, same)
        tensor([0.6931])
    """
    check_beta(beta, paper_value=0.1)
    check_per_sequence(
        policy_chosen=policy_chosen,
        policy_rejected=policy_rejected,
        reference_chosen=reference_chosen,
        reference_rejected=reference_rejected,
    )
    margin = log_ratio(policy_chosen, reference_chosen) - log_ratio(policy_rejected, reference_rejected)
    return -logsigmoid(beta * margin)
