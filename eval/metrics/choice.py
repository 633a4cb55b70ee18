"""Multiple choice: which option a model takes, from its likelihoods or from what it wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence

from biasunlearn_trainer.eval.metrics.intervals import share
from biasunlearn_trainer.eval.schema import MetricValue

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def is_chosen(values: Sequence[float], place: int) -> bool:
    """Whether the value at a place is larger than all others; a tie is no choice.

    Example:
        >>> is_chosen([-1.0, -2.0], 0), is_chosen([-1.0, -1.0], 0)
        (True, False)
    """
    return all(values[place] > value for other, value in enumerate(values) if other != place)


def written_letter(answer: str, num_options: int) -> int | None:
    """The option whose letter a written answer begins with, or None.

    Args:
        answer: what the model wrote; signs before the first letter or digit do not count ("(b)", "**B**. Anna").
        num_options: how many letters there are, from A on.

    Returns:
        Place of the option, from 0. As MLLMU-Bench's code does, the first letter decides, so that "Because" is option
        B: ask for one letter.

    Example:
        >>> [written_letter(text, 4) for text in ("B", " (c) Anna", "E", "42", "")]
        [1, 2, None, None, None]
    """
    first = re.search(r"[^\W_]", answer)
    place = LETTERS.find(first.group().upper()) if first else -1
    return place if 0 <= place < num_options else None


def choice_accuracy(correct: Sequence[bool], num_options: Sequence[int], *, to_chance: bool = False) -> MetricValue:
    """Share of right choices, 0..1, with Wilson's interval.

    Args:
        correct: (n,) whether an item's right option was chosen.
        num_options: (n,) how many options each item has.
        to_chance: the set is to be forgotten: the ideal is then chance, the mean of 1 / options, and neither a higher
            nor a lower share is better as such (MMUnlearner, arXiv 2502.11051, appendix B.2.1: "behaving similarly to
            random guessing").

    Raises:
        ValueError: where there are no items, or an item has no options.

    Example:
        >>> metric = choice_accuracy([True, False], [4, 4], to_chance=True)
        >>> metric.value, metric.ideal, metric.higher_is_better
        (0.5, 0.25, None)
    """
    if any(count < 1 for count in num_options):
        raise ValueError(f"Every item needs at least one option, got {min(num_options)}.")
    if not to_chance:
        return share(correct)
    chance = sum(1 / count for count in num_options) / max(1, len(num_options))
    return share(correct, ideal=chance, higher_is_better=None)
