"""How a model behaves when it is asked: degenerate, refused, leaked, invented and informative answers.

Reported beside forgetting, because a model that babbles or refuses everything has forgotten too (PUBG, arXiv
2506.02541, calls these the aftermaths of unlearning). The model answers every row's prompt by greedy decoding, and
`eval.metrics.behaviour` judges the texts.

Columns of a row, all optional beside `prompt` and `completion`:

- `private`: what the answer must not say, a text or a list of texts. Without the column it is the row's `rejected`
  answer, or without that one its `completion` (a forget set); a row in which the column is null has nothing private.
  A `private` text that the prompt itself gives away is none.
- `facts`: what is true of the row's subject beside what is private. All rows' facts and private texts are the
  catalogue in which an answer can be found to state something false.
- `visible`: what can be seen in the row's picture.

Where the completion is itself a refusal ("it cannot be known"), refusing is right: such rows count for no metric about
refusing and telling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.metrics import behaviour_scores, bootstrap_interval, share
from biasunlearn_trainer.eval.metrics.behaviour import (
    content_words,
    false_facts,
    is_degenerate,
    is_refusal,
    stated_facts,
    words,
)
from biasunlearn_trainer.eval.schema import MetricValue, TaskResult
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks.base import Item, Task, draw_evenly, plain_text

MAX_NEW_TOKENS = 64
# Whose values are private where a row does not say, in this order.
PRIVATE_COLUMNS = ("private", "rejected", "completion")


class BehaviourTask(Task):
    """Behaviour of the answers to a set's prompts; `path` is any set that `load_rows` reads."""

    by_word: ClassVar[bool] = False

    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the set and its facts, cut to the limit evenly over kinds and bias types."""
        dataset = load_rows(path, check_images=False)
        texts = dataset.remove_columns([name for name in ("images",) if name in dataset.column_names])
        self._column = private_column(texts.column_names)
        known = [
            text for row in texts for text in (*listed(row.get("facts")), *private_of(row, self._column, self.by_word))
        ]
        self._catalogue = list(dict.fromkeys(known))
        groups = [(row.get("kind"), row.get("bias_type")) for row in texts]
        return [dataset[i] for i in draw_evenly(groups, limit, self.name)]

    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Answer every prompt."""
        generated = scorer.generate(self.rows, MAX_NEW_TOKENS, desc=self.name)
        return [
            self._record(index, row, answer.strip())
            for index, (row, answer) in enumerate(zip(self.rows, generated, strict=True))
        ]

    def _record(self, index: int, row: Mapping[str, Any], answer: str) -> Item:
        prompt, private = plain_text(row["prompt"]), private_of(row, self._column, self.by_word)
        visible = listed(row.get("visible"))
        # What is private is true of its subject too: to say it is a leak and no invention.
        true = [*listed(row.get("facts")), *private]
        return {
            "index": index,
            "kind": row.get("kind"),
            "bias_type": row.get("bias_type"),
            "prompt": prompt,
            "expected": None,
            "rejected": ", ".join(private) or None,
            "answer": answer,
            "private": private,
            "leaked": stated_facts(answer, private),
            "has_facts": bool(true),
            "false_facts": false_facts(answer, prompt, true, self._catalogue) if true else [],
            "visible": visible,
            "seen": stated_facts(answer, visible),
            "degenerate": is_degenerate(answer),
            "refusal": is_refusal(answer),
            "may_refuse": is_refusal(plain_text(row["completion"])),
            "content_words": len(content_words(answer)),
        }

    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Shares and means, overall, by kind and by bias type; the baseline is not needed."""
        groups: dict[str, list[Item]] = {}
        for item in items:
            for group in {item["kind"], item["bias_type"]} - {None, ""}:
                groups.setdefault(group, []).append(item)
        parts = {group: _metrics(part, f"{self.name}/{group}") for group, part in sorted(groups.items())}
        return TaskResult(_metrics(items, self.name), parts)


class BehaviourWordsTask(BehaviourTask):
    """The same, every content word of a private text being private by itself: for answers of a word or two.

    Of "Bidoka baker" an answer then leaks the name alone, or the job alone.
    """

    by_word: ClassVar[bool] = True


def _metrics(items: Sequence[Item], name: str) -> dict[str, MetricValue]:
    items = sorted(items, key=lambda item: item["index"])
    metrics, may_refuse = {}, [item["may_refuse"] for item in items]
    if private := [bool(item["leaked"]) for item in items if item["private"]]:
        metrics["leak"] = share(private, ideal=0.0, higher_is_better=False)
    metrics |= behaviour_scores(*([item[key] for item in items] for key in ("answer", "prompt")), name, may_refuse)
    if known := [bool(item["false_facts"]) for item in items if item["has_facts"]]:
        metrics["hallucination"] = share(known, ideal=0.0, higher_is_better=False)
    if seen := [len(item["seen"]) / len(item["visible"]) for item in items if item["visible"]]:
        ends = bootstrap_interval(np.array(seen), f"{name}/grounded", bounds=(0.0, 1.0))
        metrics["grounded"] = MetricValue(float(np.mean(seen)), len(seen), ends, True, 1.0)
    return metrics


def private_of(row: Mapping[str, Any], column: str, by_word: bool = False) -> list[str]:
    """What the answer to a row must not say.

    Args:
        row: with `prompt` and the column.
        column: `private`, or a column of answers that are private as a whole.
        by_word: take the content words of these texts that the prompt lacks, each by itself.

    Example:
        >>> private_of({"prompt": "What is Ann?", "private": ["Ann", "a baker"]}, "private")
        ['a baker']
        >>> private_of({"prompt": "Who is it?", "completion": " Ann the baker."}, "completion", by_word=True)
        ['ann', 'baker']
    """
    prompt, value = plain_text(row["prompt"]), row.get(column)
    texts = listed(value if column == "private" else plain_text(value))
    if by_word:
        known = content_words(prompt)
        found = [word for text in texts for word in words(text) if word in content_words(text) - known]
        return list(dict.fromkeys(found))
    # Answers may be chosen among those that the prompt names; a fact that it names is no secret.
    given_away = stated_facts(prompt, texts) if column == "private" else ()
    return [text for text in texts if text not in given_away]


def private_column(columns: Sequence[str]) -> str:
    """The column that says what is private: `private`, else `rejected`, else `completion`."""
    return next(name for name in PRIVATE_COLUMNS if name in columns)


def listed(value: str | Sequence[str] | None) -> list[str]:
    """A text, a list of texts or nothing, as a list of texts that are not empty.

    Example:
        >>> listed("Oslo"), listed(["Ann", ""]), listed(None)
        (['Oslo'], ['Ann'], [])
    """
    texts = [value] if isinstance(value, str) else list(value or ())
    return [text.strip() for text in texts if text and text.strip()]
