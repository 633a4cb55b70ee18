"""TOFU: probability, ROUGE-L recall and truth ratio on its four sets, and the model utility.

`path` is ROOT/forget10 (or 01, 05), a folder or a set on the Hub: the forget split and the three sets that the authors
evaluate it on are read. Any other configuration (`ROOT/real_authors_perturbed`) is measured alone.

Forget quality compares the records of two models: `python -m biasunlearn_trainer.eval.forget_quality`.

Source: Maini et al. 2024, arXiv 2401.06121, section 2.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from biasunlearn_trainer.data_builders.sources import tofu
from biasunlearn_trainer.data_builders.sources.people import Question
from biasunlearn_trainer.data_builders.sources.published import config_name
from biasunlearn_trainer.eval.metrics import (
    mean_score,
    model_utility,
    probability_scores,
    truth_ratio_score,
    truth_ratio_scores,
)
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.tasks.base import Item
from biasunlearn_trainer.eval.tasks.clear import truth_ratios
from biasunlearn_trainer.eval.tasks.people import PeopleTask

# Sets whose probability is the right answer's share among the wrong ones: a model may know these in other words.
NORMALISED = ("real_authors", "world_facts")


class TofuTask(PeopleTask):
    """`model_utility`, and by set `probability`, `rouge_l_recall` and `truth_ratio`."""

    ways: ClassVar[Mapping[str, tuple[str, ...]]] = {"generation": ("likelihood", "rouge")}
    max_new_tokens: ClassVar[int] = 200

    def read(self, path: str) -> Mapping[str, Sequence[Question]]:
        """Read the four sets of a forget split, or the one configuration that is named."""
        if tofu.FORGET.fullmatch(config_name(path)):
            return tofu.read_evaluation(path)
        return {config_name(path): tofu.read_questions(path)}

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """The utility over the sets to keep, and each set's scores; the baseline is not needed."""
        names = list(dict.fromkeys(item["set"] for item in items))
        tables = {name: _Scores([item for item in items if item["set"] == name], name) for name in names}
        groups = {name: table.metrics(f"{self.name}/{name}") for name, table in tables.items()}
        kept = {name: table.utility() for name, table in tables.items() if not table.forgets}
        if len(groups) == 1:
            return TaskResult(next(iter(groups.values())))
        metrics = {"model_utility": model_utility(kept, self.name)} if all(map(len, kept.values())) else {}
        forgotten = next(name for name, table in tables.items() if table.forgets)
        metrics |= {f"forget_{metric}": value for metric, value in groups[forgotten].items()}
        return TaskResult(metrics, groups)


class _Scores:
    """The scores of one set, an item a row."""

    def __init__(self, items: Sequence[Item], name: str):
        self.forgets = name.startswith("forget")
        self.scored = [item for item in items if item["way"] == "likelihood"]
        self.rouge = [item["rouge_l_recall"] for item in items if item["way"] == "rouge"]
        self.has_wrong = all(item["mean_logps_wrong"] for item in self.scored)
        self.ratios = truth_ratios(self.scored) if self.has_wrong else None
        wrong = None
        if self.has_wrong and name.startswith(NORMALISED):
            wrong = np.array([item["mean_logps_wrong"] for item in self.scored])
        self.probabilities = probability_scores(np.array([item["mean_logp"] for item in self.scored]), wrong)

    def metrics(self, name: str) -> dict[str, MetricValue]:
        """The set's three means; those of the forget set are not judged, `forget_quality` is."""
        direction = {"ideal": None, "higher_is_better": None} if self.forgets else {}
        metrics = {
            "probability": mean_score(self.probabilities, f"{name}/probability", **direction),
            "rouge_l_recall": mean_score(self.rouge, f"{name}/rouge_l_recall", **direction),
        }
        if self.ratios is not None:
            metrics["truth_ratio"] = truth_ratio_score(self.ratios, self.forgets, f"{name}/truth_ratio")
        return metrics

    def utility(self) -> np.ndarray:
        """(n, 3) in the order of `UTILITY_PARTS`; empty where a set has no wrong answers."""
        if self.ratios is None:
            return np.empty((0, 3))
        return np.stack([self.rouge, self.probabilities, truth_ratio_scores(self.ratios, forget=False)], axis=1)
