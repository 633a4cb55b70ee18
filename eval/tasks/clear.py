"""CLEAR: does a model still know made-up authors by portrait, and what TOFU says of them?

`path` is ROOT/CONFIG, a folder or a set on the Hub (`data_builders.sources.clear`); which metrics there are hangs on
the configuration. Two protocols:

- `clear`: choices (name of a face, `real_faces`, `real_world`) by the likeliest letter; of captions and answers the
  probability, and where there are wrong ones the truth ratio. Nothing is written.
- `clear_generate`: choices by the letter that is written, captions and answers by ROUGE-L.

MMUnlearner's table: forget VQA = `vqa_accuracy` of `forget05_perturbed`, forget QA = `qa_rouge_l` of `forget05+tofu`.

Source: Dontsov et al. 2024, arXiv 2410.18057; Huo et al. 2025, arXiv 2502.11051, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from biasunlearn_trainer.data_builders.sources import clear
from biasunlearn_trainer.data_builders.sources.people import MODALITIES, Question
from biasunlearn_trainer.data_builders.sources.published import config_name
from biasunlearn_trainer.eval.metrics import mean_score, probability_scores, truth_ratio, truth_ratio_score
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.tasks.base import Item
from biasunlearn_trainer.eval.tasks.mllmu_bench import summarise_people
from biasunlearn_trainer.eval.tasks.people import PeopleTask, of_kind


class ClearTask(PeopleTask):
    """`*_accuracy`, `*_probability` and `*_truth_ratio`, from likelihoods."""

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = {"choice": ("letters",), "generation": ("likelihood",)}

    def read(self, path: str) -> Mapping[str, Sequence[Question]]:
        """Read one configuration."""
        return {config_name(path): clear.read_questions(path)}

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Accuracies and scores by modality; the baseline is not needed."""
        metrics = summarise_people(items, self.name, self.forgets)
        for modality in MODALITIES:
            scored = of_kind(items, f"{modality}_generation", "likelihood")
            metrics |= likelihood_metrics(scored, modality, self.name, self.forgets)
            metrics |= self._recall(of_kind(items, f"{modality}_generation", "rouge"), modality)
        return TaskResult(metrics)

    def _recall(self, items: Sequence[Item], modality: str) -> dict[str, MetricValue]:
        """ROUGE-L recall, which the authors report; MMUnlearner reports the F1, `*_rouge_l`."""
        if not items:
            return {}
        gone = self.forgets and modality == "vqa"
        direction = {"ideal": None, "higher_is_better": None} if gone else {}
        name = f"{modality}_rouge_l_recall"
        return {name: mean_score([item["rouge_l_recall"] for item in items], f"{self.name}/{name}", **direction)}


class ClearGenerateTask(ClearTask):
    """`*_accuracy`, `*_rouge_l` (F1) and `*_rouge_l_recall`, from what the model writes."""

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = {"choice": ("written",), "generation": ("rouge",)}


def likelihood_metrics(items: Sequence[Item], modality: str, name: str, forgets: bool) -> dict[str, MetricValue]:
    """`MODALITY_probability` and, of items with wrong answers, `MODALITY_truth_ratio` (arithmetic mean)."""
    if not items:
        return {}
    gone = forgets and modality == "vqa"
    direction = {"ideal": None, "higher_is_better": None} if gone else {}
    probabilities = probability_scores(np.array([item["mean_logp"] for item in items]))
    metrics = {f"{modality}_probability": mean_score(probabilities, f"{name}/{modality}_probability", **direction)}
    with_wrong = [item for item in items if item["mean_logps_wrong"]]
    if with_wrong:
        ratios = truth_ratios(with_wrong)
        metrics[f"{modality}_truth_ratio"] = truth_ratio_score(ratios, forgets, f"{name}/{modality}_truth_ratio")
    return metrics


def truth_ratios(items: Sequence[Item], mean: str = "arithmetic") -> np.ndarray:
    """The truth ratio of each record; its right answer is the paraphrased one where there is one.

    Args:
        items: records with wrong answers; not all need have as many.
        mean: as for `truth_ratio`.
    """
    ratios = []
    for item in items:
        paraphrased = item["mean_logp_paraphrased"]
        right = item["mean_logp"] if paraphrased is None else paraphrased
        ratios.append(truth_ratio([right], [item["mean_logps_wrong"]], mean)[0])
    return np.array(ratios)
