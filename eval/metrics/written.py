"""What a written answer has in common with the right one: ROUGE-L, and whether it contains it (cloze)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from biasunlearn_trainer.eval.metrics.intervals import bootstrap_interval
from biasunlearn_trainer.eval.schema import MetricValue


class RougeL(NamedTuple):
    """ROUGE-L of one answer, each 0..1."""

    recall: float
    precision: float
    f1: float


def rouge_l(answer: str, reference: str) -> RougeL:
    """ROUGE-L: what the answer and the reference have in common as a subsequence of words.

        recall = LCS / words of the reference,  precision = LCS / words of the answer,
        f1 = 2 * recall * precision / (recall + precision)

    with LCS the length of the longest common subsequence; words are lower case, in the Latin alphabet and digits, and
    Porter-stemmed from four letters on, as the code of TOFU, CLEAR and MLLMU-Bench does (`rouge_score` with
    `use_stemmer=True`). Two texts without such a word have nothing in common: 0.

    Args:
        answer: what the model wrote.
        reference: the right answer.

    Raises:
        ImportError: `rouge_score` is not installed; it is an extra.

    Source: Lin 2004, "ROUGE: A package for automatic evaluation of summaries"; MMUnlearner eq. 10-12. The code of
    TOFU and of CLEAR reports the recall; that of MLLMU-Bench, and of MMUnlearner on CLEAR, the F1.
    """
    score = rouge_scorer().score(reference, answer)["rougeL"]
    return RougeL(score.recall, score.precision, score.fmeasure)


@lru_cache(maxsize=1)
def rouge_scorer() -> Any:
    """The scorer of `rouge_score`; tasks call it when they are loaded, so that a missing extra is found early."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as err:
        raise ImportError(
            "ROUGE-L needs rouge_score, which is an extra: pip install biasunlearn_trainer[eval]"
        ) from err
    return RougeScorer(["rougeL"], use_stemmer=True)


def contains_answer(answer: str, expected: str) -> bool:
    """Whether a written answer contains the expected one, whatever the case and the spacing (cloze accuracy).

    Source: MLLMU-Bench's fill-in-the-blank task (Liu et al. 2024, arXiv 2410.22108) counts an answer that contains the
    blank's text.

    Raises:
        ValueError: where nothing is expected, which every answer would contain.

    Example:
        >>> contains_answer("She was born in  New York.", "new york"), contains_answer("York", "New York")
        (True, False)
    """
    expected, answer = (" ".join(text.casefold().split()) for text in (expected, answer))
    if not expected:
        raise ValueError("The expected answer is empty; every answer would contain it. Drop the item.")
    return expected in answer


def mean_score(
    values: Sequence[float], name: str, *, ideal: float | None = 1.0, higher_is_better: bool | None = True
) -> MetricValue:
    """The mean of scores between 0 and 1, with a bootstrap interval over items.

    Args:
        values: (n,) one score an item, each 0..1.
        name: of the task and metric, for the seed.
        ideal: the mean of a model that is as it should be.
        higher_is_better: None where neither direction is better.

    Raises:
        ValueError: where there are no items, or a score is not finite.
    """
    interval = bootstrap_interval(np.asarray(values, dtype=float), name, bounds=(0.0, 1.0))
    return MetricValue(float(np.mean(values)), len(values), interval, higher_is_better, ideal)
