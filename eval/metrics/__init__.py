"""Metrics and their intervals, in numpy alone. docs/metrics.md has the definitions in one table."""

from biasunlearn_trainer.eval.metrics.bbq import bbq_scores
from biasunlearn_trainer.eval.metrics.behaviour import behaviour_scores
from biasunlearn_trainer.eval.metrics.choice import choice_accuracy, is_chosen, written_letter
from biasunlearn_trainer.eval.metrics.crows_pairs import crows_pairs_scores
from biasunlearn_trainer.eval.metrics.intervals import (
    NUM_RESAMPLES,
    Z95,
    Statistic,
    bootstrap_interval,
    paired_difference,
    seed_from_name,
    share,
    stretch,
    wilson_interval,
)
from biasunlearn_trainer.eval.metrics.locality import Choices, locality_scores
from biasunlearn_trainer.eval.metrics.stereoset import STEREOSET_METRICS, icat, stereoset_scores, term_scores
from biasunlearn_trainer.eval.metrics.tofu import (
    forget_quality,
    model_utility,
    probability_scores,
    truth_ratio,
    truth_ratio_score,
    truth_ratio_scores,
)
from biasunlearn_trainer.eval.metrics.written import contains_answer, mean_score, rouge_l

__all__ = [
    "NUM_RESAMPLES",
    "STEREOSET_METRICS",
    "Z95",
    "Choices",
    "Statistic",
    "bbq_scores",
    "behaviour_scores",
    "bootstrap_interval",
    "choice_accuracy",
    "contains_answer",
    "crows_pairs_scores",
    "forget_quality",
    "icat",
    "is_chosen",
    "locality_scores",
    "mean_score",
    "model_utility",
    "paired_difference",
    "probability_scores",
    "rouge_l",
    "seed_from_name",
    "share",
    "stereoset_scores",
    "stretch",
    "term_scores",
    "truth_ratio",
    "truth_ratio_score",
    "truth_ratio_scores",
    "wilson_interval",
    "written_letter",
]
