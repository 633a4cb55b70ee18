"""The training sets themselves: how likely their completions still are. For runs that name no other task.

It says whether training did what it was asked to on the rows it saw, and nothing about new rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.metrics import bootstrap_interval, share
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly, plain_text

MAX_NEW_TOKENS = 32


class RetainSetTask(Task):
    """Rows to keep: `nll`, nats per token of the completions, and `reproduced`, the share given by greedy decoding."""

    kind: ClassVar[str] = "retain"
    nll_direction: ClassVar[bool | None] = False
    reproduced_direction: ClassVar[bool | None] = True

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the set, cut to the limit evenly over its bias types."""
        dataset = load_rows(path, check_images=False)
        has_types = "bias_type" in dataset.column_names
        groups = dataset["bias_type"] if has_types else [None] * len(dataset)
        return [dataset[i] for i in draw_evenly(groups, limit, self.name)]

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Score the completion of every row."""
        scores = scorer.score(self.rows, desc=self.name)
        wrong = [index for index, score in enumerate(scores) if not score.is_greedy]
        rows = [self.rows[index] for index in wrong] if answers else []
        told = dict(zip(wrong, scorer.generate(rows, MAX_NEW_TOKENS) if rows else [], strict=False))
        items = []
        for index, (row, score) in enumerate(zip(self.rows, scores, strict=True)):
            completion = plain_text(row["completion"])
            is_kept = self.kind == "retain"
            items.append(
                {
                    "index": index,
                    "kind": self.kind,
                    "bias_type": row.get("bias_type"),
                    "prompt": plain_text(row["prompt"]),
                    "expected": completion if is_kept else None,
                    "rejected": None if is_kept else completion,
                    "answer": completion if score.is_greedy else told.get(index),
                    "correct": score.is_greedy,
                    "logp_completion": score.logp,
                    "num_tokens": score.num_tokens,
                }
            )
        return items

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Mean over rows of the nats per token, and the share reproduced; the baseline is not needed."""
        nll = np.array([-item["logp_completion"] / item["num_tokens"] for item in items])
        interval = bootstrap_interval(nll, f"{self.name}/nll")
        reproduced = [item["correct"] for item in items]
        return TaskResult(
            {
                "nll": MetricValue(float(nll.mean()), len(items), interval, self.nll_direction),
                "reproduced": share(reproduced, ideal=None, higher_is_better=self.reproduced_direction),
            }
        )


class ForgetSetTask(RetainSetTask):
    """Rows to forget: the same two numbers. How far they should go is not known, so they are not judged."""

    kind: ClassVar[str] = "forget"
    nll_direction: ClassVar[bool | None] = None
    reproduced_direction: ClassVar[bool | None] = None
