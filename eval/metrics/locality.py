"""How much of what a model says about other things is unchanged: three protocols and a divergence.

A model's choices along the reference answer of an item are, token by token, its likeliest words with their log p. All
four compare those before and after unlearning on the same items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biasunlearn_trainer.eval.metrics.intervals import bootstrap_interval, share
from biasunlearn_trainer.eval.schema import MetricValue

ROUNDING = 1e-6


@dataclass(frozen=True)
class Choices:
    """A model's likeliest words at one token, the likeliest first.

    Attributes:
        ids: (m,) ids of the words.
        logps: (m,) their log p in nats.
    """

    ids: tuple[int, ...]
    logps: tuple[float, ...]


Answer = Sequence[Choices]
"""The choices along one item's reference answer, token by token."""


def is_top1_unchanged(before: Answer, after: Answer) -> bool:
    """Protocol `top1`: the first choice is the same at every token of the answer."""
    return all(b.ids[0] == a.ids[0] for b, a in zip(before, after, strict=True))


def topk_overlap(before: Answer, after: Answer, k: int) -> float:
    """Protocol `topk_overlap`: |first k before and after| / k, the mean over tokens; 0..1, order does not matter."""
    shares = [len({*b.ids[:k]} & {*a.ids[:k]}) / k for b, a in zip(before, after, strict=True)]
    return sum(shares) / len(shares)


def topk_positional(before: Answer, after: Answer, k: int) -> float:
    """Protocol `topk_positional`: the share of the first k ranks that hold the same word, the mean over tokens; 0..1.

    Two words that change places count as two changes: the value falls without any harm to the answer. It is here for
    parity with published tables alone (EasyEdit's multimodal trainer: k = 1 for text, 10 for pictures).
    """
    shares = [
        sum(x == y for x, y in zip(b.ids[:k], a.ids[:k], strict=True)) / k for b, a in zip(before, after, strict=True)
    ]
    return sum(shares) / len(shares)


def token_kl(before: Choices, after: Choices) -> float:
    """KL(before || after) in nats, from below: the least that any two distributions with these first words have.

    Words of both lists count as they are. The others fall into two cells: words that `before` alone lists, and all the
    rest; lumping words together can only lower a divergence. Of the first cell `after` tells no more than that none of
    its words is likelier than the last one listed, and that what it lists besides takes its share; within these bounds
    the cell gets what makes the divergence smallest. Where both lists are the vocabulary this is the KL itself; whole
    distributions of two models that are never in memory together would be 600 KB a token.
    """
    later = dict(zip(after.ids, after.logps, strict=True))
    pairs = [(p, later[word]) for word, p in zip(before.ids, before.logps, strict=True) if word in later]
    total = sum(math.exp(p) * (p - q) for p, q in pairs)
    lost = [p for word, p in zip(before.ids, before.logps, strict=True) if word not in later]
    lost_before = sum(map(math.exp, lost))
    rest_before, rest_after = (max(0.0, 1.0 - sum(math.exp(pair[side]) for pair in pairs)) for side in (0, 1))
    most = min(len(lost) * math.exp(after.logps[-1]), max(0.0, 1.0 - sum(map(math.exp, after.logps))))
    lost_after = min(rest_after * lost_before / rest_before, most) if rest_before > ROUNDING else 0.0
    cells = ((lost_before, lost_after), (rest_before - lost_before, rest_after - lost_after))
    # What is below ROUNDING is what float32 leaves of a whole vocabulary, and no probability.
    total += sum(p * math.log(p / max(q, ROUNDING)) for p, q in cells if p > ROUNDING)
    return max(0.0, total)


def locality_scores(
    before: Sequence[Answer], after: Sequence[Answer], name: str, *, k: int = 10, positional_k: int = 10
) -> dict[str, MetricValue]:
    """The four measures of a locality.

    Args:
        before: of each item, the choices of the model before unlearning.
        after: the same of the model after it, in the same order.
        name: of the metric ("t_locality"); with it begin the names of the results, and it seeds their intervals.
        k: of `topk_overlap`.
        positional_k: of `topk_positional`.

    Returns:
        NAME (protocol `top1`, Wilson's interval), NAME_topk_overlap, NAME_topk_positional and NAME_kl (bootstrap over
        items). The first three are shares with the ideal 1; the KL is in nats a token with the ideal 0.

    Raises:
        ValueError: no items, another number of items or tokens, or lists shorter than k.

    Source: Cheng et al. 2023, "Can We Edit Multimodal Large Language Models?", for T- and M-locality.
    """
    if len(before) != len(after) or not before:
        raise ValueError(f"{name} needs the same items before and after, got {len(before)} and {len(after)}.")
    for number, (b, a) in enumerate(zip(before, after, strict=True)):
        if len(b) != len(a) or not b:
            raise ValueError(f"{name}: item {number} has {len(b)} tokens before and {len(a)} after; use one tokenizer.")
        if min(len(token.ids) for token in (*b, *a)) < max(k, positional_k):
            raise ValueError(f"{name}: item {number} has fewer than {max(k, positional_k)} choices at a token.")
    pairs = list(zip(before, after, strict=True))
    measured = {name: share([is_top1_unchanged(b, a) for b, a in pairs])}
    shares = {
        f"{name}_topk_overlap": [topk_overlap(b, a, k) for b, a in pairs],
        f"{name}_topk_positional": [topk_positional(b, a, positional_k) for b, a in pairs],
    }
    for metric, values in shares.items():
        interval = bootstrap_interval(np.array(values), metric, bounds=(0.0, 1.0))
        measured[metric] = MetricValue(float(np.mean(values)), len(values), interval, True, 1.0)
    divergences = np.array([np.mean([token_kl(*tokens) for tokens in zip(b, a, strict=True)]) for b, a in pairs])
    interval = bootstrap_interval(divergences, f"{name}_kl")
    measured[f"{name}_kl"] = MetricValue(float(divergences.mean()), len(pairs), interval, False, 0.0)
    return measured
