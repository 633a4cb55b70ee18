"""The losses: pure functions of log-probabilities or logits, one value per sequence, averaged by the caller.

They need torch alone, keep float64 where they are given it, and compute in float32 otherwise.
"""

from biasunlearn_trainer.losses.divergence import kl_loss, token_kl
from biasunlearn_trainer.losses.gradient_ascent import gradient_ascent_loss, nll_loss
from biasunlearn_trainer.losses.log_probs import sequence_mean, sequence_sum, token_log_probs
from biasunlearn_trainer.losses.npo import npo_biasunlearn_loss, npo_loss, npo_mllmu_loss, simnpo_loss
from biasunlearn_trainer.losses.preference import dpo_loss

__all__ = [
    "dpo_loss",
    "gradient_ascent_loss",
    "kl_loss",
    "nll_loss",
    "npo_biasunlearn_loss",
    "npo_loss",
    "npo_mllmu_loss",
    "sequence_mean",
    "sequence_sum",
    "simnpo_loss",
    "token_kl",
    "token_log_probs",
]
