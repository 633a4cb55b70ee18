"""MLLMU-Bench: does a model still know a person by portrait (VQA), and by name (QA)?

`path` is ROOT/CONFIG, a folder or a set on the Hub (`data_builders.sources.mllmu_bench`). Two protocols:

- `mllmu_bench`: multiple choice by the likeliest letter, nothing written; MMUnlearner's table is of this kind.
- `mllmu_bench_generate`: as the authors measure: the letter that the model writes, ROUGE-L of answers in one sentence,
  and cloze; without the one or two solved examples that their code shows first.

With `_test` (`mllmu_bench_test`, `mllmu_bench_test_generate`) the path names a forget configuration, and asked are the
questions of `Test_Set` about its people: pictures that were not unlearned.

Source: Liu et al. 2024, arXiv 2410.22108; Huo et al. 2025, arXiv 2502.11051, section 4.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from biasunlearn_trainer.data_builders.sources import mllmu_bench
from biasunlearn_trainer.data_builders.sources.people import MODALITIES, Question
from biasunlearn_trainer.data_builders.sources.published import config_name
from biasunlearn_trainer.eval.metrics import choice_accuracy, mean_score, share
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.tasks.base import Item
from biasunlearn_trainer.eval.tasks.people import PeopleTask, of_kind


class MLLMUBenchTask(PeopleTask):
    """`vqa_accuracy` and `qa_accuracy` by the likeliest letter."""

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = {"choice": ("letters",)}

    def read(self, path: str) -> Mapping[str, Sequence[Question]]:
        """Read one configuration."""
        return {config_name(path): mllmu_bench.read_questions(path)}

    def prompt(self, question: Question) -> str:
        """As the authors' code asks."""
        if question.form == "generation":
            return (
                f"{question.question}\nAnswer the question based on your trained knowledge in one sentence in ENGLISH."
            )
        if question.form == "cloze":
            blank = question.question.replace("__", "[Blank]")
            return f"{blank}\nPlease **ONLY** provide the correct answer that should replace the [Blank]."
        return super().prompt(question)

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Accuracies and scores by modality; the baseline is not needed."""
        return TaskResult(summarise_people(items, self.name, self.forgets))


class MLLMUBenchGenerateTask(MLLMUBenchTask):
    """Accuracies by the letter that is written, and `*_rouge_l` (F1) and `*_cloze`."""

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "choice": ("written",),
        "generation": ("rouge",),
        "cloze": ("written",),
    }


class MLLMUBenchTestTask(MLLMUBenchTask):
    """The test set's portraits of the people of a forget configuration, by the likeliest letter."""

    def read(self, path: str) -> Mapping[str, Sequence[Question]]:
        """Read `Test_Set` beside the forget configuration."""
        return {mllmu_bench.TEST_SET: mllmu_bench.read_test_questions(path)}


class MLLMUBenchTestGenerateTask(MLLMUBenchTestTask, MLLMUBenchGenerateTask):
    """The same, written."""


def summarise_people(items: Sequence[Item], name: str, forgets: bool) -> dict[str, MetricValue]:
    """The metrics of records, by modality.

    Args:
        items: records of a `PeopleTask`.
        name: of the task, for the seeds.
        forgets: the people are to be forgotten: what a portrait tells (VQA) should fall to chance. Text QA should stay
            as it was in any case: MMUnlearner's definition (arXiv 2502.11051, section 3.1).
    """
    metrics = {}
    for modality in MODALITIES:
        gone = forgets and modality == "vqa"
        direction = {"ideal": None, "higher_is_better": None} if gone else {}
        choices = of_kind(items, f"{modality}_choice", "letters", "written")
        if choices:
            metrics[f"{modality}_accuracy"] = choice_accuracy(
                [item["correct"] for item in choices], [item["num_options"] for item in choices], to_chance=gone
            )
        if written := of_kind(items, f"{modality}_generation", "rouge"):
            scores = [item["rouge_l_f1"] for item in written]
            metrics[f"{modality}_rouge_l"] = mean_score(scores, f"{name}/{modality}_rouge_l", **direction)
        if blanks := of_kind(items, f"{modality}_cloze", "written"):
            metrics[f"{modality}_cloze"] = share([item["correct"] for item in blanks], **direction)
    return metrics
