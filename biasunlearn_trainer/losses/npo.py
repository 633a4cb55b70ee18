"""Negative preference optimisation: gradient ascent that fades out as the completion becomes unlikely.

With `gap` = NLL_theta - NLL_ref, the nats by which the completion became less likely, the gradient is that of ascent
times 2 sigmoid(-beta gap): 1 at the start, towards 0 once forgotten. `beta` and the unit of the gap belong together: at
beta 0.1 a summed gap of 30 nats leaves a weight of 0.095; the same 30 nats over 10 tokens, a per-token gap of 3, leave
0.85, almost plain ascent. To keep the weight after averaging over |y| tokens, multiply beta by |y|.
"""

import torch
from torch.nn.functional import logsigmoid

from biasunlearn_trainer.losses.checks import check_beta, check_per_sequence
from biasunlearn_trainer.losses.log_probs import log_ratio, per_token


def npo_loss(policy_logps: torch.Tensor, reference_logps: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """Return NPO = (2/beta) log(1 + (pi/ref)^beta) = -(2/beta) log sigmoid(-beta log(pi/ref)).

    It is (2/beta) log 2 where the policies agree and goes to 0 with pi/ref. For beta -> 0 it is gradient ascent on the
    sum, apart from a constant. For a mean reduction divide both log-probabilities by the lengths, and scale beta as the
    module's text says.

    Args:
        policy_logps: (B,), log pi(y | x) summed over completion tokens, nats.
        reference_logps: (B,), the same under the model before unlearning; it gets no gradient.
        beta: inverse temperature, > 0, per nat.

    Returns:
        (B,), at least 0.

    Raises:
        ValueError: if a shape is not (B,) or beta is not positive.

    Source: Zhang et al. 2024 (arXiv 2404.05868) eq. 3, beta 0.1.

    Example:
        >>> npo_loss(torch.tensor([-5.0]), torch.tensor([-5.0]))  # 20 log 2
        tensor([13.8629])
    """
    check_beta(beta, paper_value=0.1)
    check_per_sequence(policy_logps=policy_logps, reference_logps=reference_logps)
    return -(2 / beta) * logsigmoid(-beta * log_ratio(policy_logps, reference_logps))


def npo_mllmu_loss(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, lengths: torch.Tensor, beta: float = 0.4
) -> torch.Tensor:
    """Return NPO as MLLMU-Bench's code computes it: one gap for the batch, averaged over all its tokens.

    gap = (sum_b log ref - sum_b log pi) / sum_b |y_b|, and the loss is -(2/beta) log sigmoid(beta gap). It is nonlinear
    in the micro-batch: cutting a batch for accumulation or over processes changes it. It exists to rerun published
    numbers.

    Args:
        policy_logps: (B,), summed over completion tokens, nats.
        reference_logps: (B,), the same under the reference, there a base model tuned on the retain set; no gradient.
        lengths: (B,), completion tokens per sequence.
        beta: inverse temperature, > 0, per (nat per token).

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: if a shape is not (B,) or beta is not positive.

    Source: MMUnlearner (arXiv 2502.11051) eq. 19, beta 0.4, after the code of MLLMU-Bench (arXiv 2410.22108).

    Example:
        >>> npo_mllmu_loss(torch.tensor([-4.0]), torch.tensor([-4.0]), torch.tensor([2]))  # 5 log 2
        tensor(3.4657)
    """
    check_beta(beta, paper_value=0.4)
    check_per_sequence(policy_logps=policy_logps, reference_logps=reference_logps, lengths=lengths)
    ratio = per_token(log_ratio(policy_logps, reference_logps).sum(), lengths.sum())
    return -(2 / beta) * logsigmoid(-beta * ratio)


def npo_biasunlearn_loss(
    policy_logps: torch.Tensor, reference_logps: torch.Tensor, lengths: torch.Tensor, beta: float = 0.1
) -> torch.Tensor:
    """Return NPO as BiasUnlearn's code computes it: one gap for the batch, the mean of per-sequence token means.

    gap = mean_b [(log ref - log pi) / |y_b|], and the loss is -(2/beta) log sigmoid(beta gap). It is nonlinear in the
    micro-batch: cutting a batch for accumulation or over processes changes it. It exists to rerun published numbers.

    Args:
        policy_logps: (B,), summed over completion tokens, nats.
        reference_logps: (B,), the same under the model before unlearning; no gradient.
        lengths: (B,), completion tokens per sequence.
        beta: inverse temperature, > 0, per (nat per token).

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: if a shape is not (B,) or beta is not positive.

    Source: the published code of BiasUnlearn (arXiv 2509.25673), beta 0.1.

    Example:
        >>> npo_biasunlearn_loss(torch.tensor([-4.0]), torch.tensor([-4.0]), torch.tensor([2]))  # 20 log 2
        tensor(13.8629)
    """
    check_beta(beta, paper_value=0.1)
    check_per_sequence(policy_logps=policy_logps, reference_logps=reference_logps, lengths=lengths)
    ratio = per_token(log_ratio(policy_logps, reference_logps), lengths).mean()
    return -(2 / beta) * logsigmoid(-beta * ratio)


def simnpo_loss(
    policy_logps: torch.Tensor, lengths: torch.Tensor, beta: float = 4.5, delta: float = 0.0
) -> torch.Tensor:
    """Return SimNPO = -(2/beta) log sigmoid(-(beta/|y|) log pi(y | x) - delta): NPO without a reference.

    The gradient on log pi is 2 sigmoid(delta - beta NLL) / |y|, with NLL in nats per token: ascent is strongest on what
    the model still finds likely, whatever it found likely before.

    Args:
        policy_logps: (B,), log pi(y | x) summed over completion tokens, nats.
        lengths: (B,), completion tokens per sequence.
        beta: inverse temperature, > 0, per (nat per token).
        delta: the paper's reward margin gamma, no unit; ascent fades beyond NLL = delta/beta. open-unlearning places
            it inside the product, beta (NLL - delta'): its value times beta is this one.

    Returns:
        (B,), at least 0.

    Raises:
        ValueError: if a shape is not (B,) or beta is not positive.

    Source: Fan et al. 2024 (arXiv 2410.07163); beta 4.5 and margin 0 are its values for TOFU forget10.

    Example:
        >>> simnpo_loss(torch.tensor([0.0]), torch.tensor([3]), beta=2.0)  # log 2: a certain completion
        tensor([0.6931])
    """
    check_beta(beta, paper_value=4.5)
    check_per_sequence(policy_logps=policy_logps, lengths=lengths)
    return -(2 / beta) * logsigmoid(-beta * per_token(policy_logps, lengths) - delta)
