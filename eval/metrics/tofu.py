"""TOFU's numbers: truth ratio, probability, model utility and forget quality (Maini et al. 2024, arXiv 2401.06121).

Everything is made of log p per token, in nats: log P(a | q) / |a|. A probability below is its exponential, the
geometric mean of the tokens' probabilities, 0..1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from biasunlearn_trainer.eval.metrics.intervals import _resampled_means, seed_from_name, stretch
from biasunlearn_trainer.eval.metrics.written import mean_score
from biasunlearn_trainer.eval.schema import MetricValue

# Largest product of two sample sizes whose p value is counted exactly: about a second. TOFU's own is 400 * 400.
EXACT_UP_TO = 1_000_000
UTILITY_PARTS = ("rouge", "probability", "truth_ratio")


def truth_ratio(correct: np.ndarray, wrong: np.ndarray, mean: str = "arithmetic") -> np.ndarray:
    """How likely the wrong answers are beside the right one.

        R = mean_i P(wrong_i | q)^(1/|wrong_i|) / P(correct | q)^(1/|correct|)

    Args:
        correct: (n,) log p per token of the right answer: its paraphrase where the set has one, so that a model is not
            judged by the wording it was trained on.
        wrong: (n, k) log p per token of the k wrong (perturbed) answers.
        mean: `arithmetic`, as the paper has it and the published code's model utility; or `geometric`, which averages
            log p, as the published code's forget quality (and open-unlearning everywhere).

    Returns:
        (n,) ratios, 0 or more: below 1 the right answer is the likelier one.

    Raises:
        ValueError: for another mean, shapes that do not fit, or values above 0 or NaN.

    Source: the paper, section 2.2; `aggregate_eval_stat.py` and `evaluate_util.py` of its code.

    Example:
        >>> import numpy as np
        >>> truth_ratio(np.log([0.5]), np.log([[0.4, 0.1]])).round(6), float(truth_ratio(
        ...     np.log([0.5]), np.log([[0.4, 0.1]]), mean="geometric").round(6)[0])
        (array([0.5]), 0.4)
    """
    correct, wrong = np.asarray(correct, dtype=float), np.asarray(wrong, dtype=float)
    if mean not in ("arithmetic", "geometric"):
        raise ValueError(f"`mean` must be arithmetic or geometric, got {mean!r}.")
    if correct.ndim != 1 or wrong.ndim != 2 or len(correct) != len(wrong) or not wrong.size:
        raise ValueError(f"Expected (n,) and (n, k) log-probabilities, got {correct.shape} and {wrong.shape}.")
    if not ((correct <= 0).all() and (wrong <= 0).all()):
        raise ValueError("Log-probabilities must be at most 0, and numbers. Pass log p per token, not losses.")
    if mean == "geometric":
        return np.exp(wrong.mean(1) - correct)
    # The largest is taken out, so that answers of probability 0 in float64 still have a ratio.
    top = wrong.max(1)
    return np.exp(top - correct) * np.exp(wrong - top[:, None]).mean(1)


def truth_ratio_scores(ratios: np.ndarray, forget: bool) -> np.ndarray:
    """Per item, the truth ratio as a score between 0 and 1.

    Args:
        ratios: (n,) from `truth_ratio`.
        forget: on the forget set min(R, 1/R), 1 where right and wrong answers are equally likely; otherwise
            max(0, 1 - R), 1 where the wrong ones are impossible.

    Source: the paper, section 2.2; the same two in its code.

    Example:
        >>> import numpy as np
        >>> truth_ratio_scores(np.array([0.25, 2.0]), True), truth_ratio_scores(np.array([0.25, 2.0]), False)
        (array([0.25, 0.5 ]), array([0.75, 0.  ]))
    """
    ratios = np.asarray(ratios, dtype=float)
    if not forget:
        return np.maximum(0.0, 1.0 - ratios)
    with np.errstate(divide="ignore"):
        return np.minimum(ratios, 1.0 / ratios)


def probability_scores(correct: np.ndarray, wrong: np.ndarray | None = None) -> np.ndarray:
    """Per item, P(a | q)^(1/|a|); with wrong answers, its share of the sum over all of them.

    Args:
        correct: (n,) log p per token of the right answer.
        wrong: (n, k) of the wrong ones, for Real Authors and World Facts, where a model may know the answer in other
            words.

    Example:
        >>> import numpy as np
        >>> probability_scores(np.log([0.5]), np.log([[0.3, 0.2]])).round(6)
        array([0.5])
    """
    correct = np.asarray(correct, dtype=float)
    if wrong is None:
        return np.exp(correct)
    everything = np.column_stack([correct, np.asarray(wrong, dtype=float)])
    shifted = np.exp(everything - everything.max(1, keepdims=True))
    return shifted[:, 0] / shifted.sum(1)


def model_utility(sets: Mapping[str, Sequence[Sequence[float]]], name: str = "tofu") -> MetricValue:
    """The harmonic mean of the nine means: ROUGE-L recall, probability and truth ratio on three sets.

        MU = 9 / sum over sets and scores of 1 / mean;  0 where a mean is 0

    Args:
        sets: by name (retain, real authors, world facts) the scores of its items, (n, 3) in the order of
            `UTILITY_PARTS`, each 0..1.
        name: of the task, for the seeds.

    Returns:
        The utility, 0..1. The interval is a percentile bootstrap that resamples the items of each set by themselves,
        the three scores of an item together, widened as for the smallest set.

    Raises:
        ValueError: where a set has no items, or not three finite scores between 0 and 1 each.

    Source: the paper, section 2.2, "model utility".

    Example:
        >>> model_utility({"retain": [[1, 1, 1]], "authors": [[0.5, 0.5, 0.5]], "facts": [[1, 1, 1]]}).value
        0.75
    """
    tables = {part: np.asarray(values, dtype=float) for part, values in sets.items()}
    for part, table in tables.items():
        if table.ndim != 2 or not len(table) or table.shape[1] != len(UTILITY_PARTS):
            raise ValueError(f"{part}: expected (n, 3) scores ({', '.join(UTILITY_PARTS)}), got {table.shape}.")
        if not ((table >= 0) & (table <= 1)).all():
            raise ValueError(f"{part}: scores must lie between 0 and 1, got {table.min()} to {table.max()}.")
    means = np.concatenate([table.mean(0) for table in tables.values()])
    drawn = [_resampled_means(table, seed_from_name(f"{name}/model_utility/{part}")) for part, table in tables.items()]
    value, resampled = float(_harmonic_mean(means)), _harmonic_mean(np.hstack(drawn))
    smallest = min(map(len, tables.values()))
    ends = value + stretch(smallest) * (np.quantile(resampled, [0.025, 0.975]) - value)
    low, high = np.clip(ends, 0.0, 1.0)
    interval = (min(float(low), value), max(float(high), value))
    return MetricValue(value, sum(map(len, tables.values())), interval, True, None)


def _harmonic_mean(values: np.ndarray) -> np.ndarray:
    """Over the last axis; 0 where a value is 0."""
    with np.errstate(divide="ignore"):
        return values.shape[-1] / (1.0 / values).sum(-1)


def ks_distance(first: Sequence[float], second: Sequence[float]) -> float:
    """The Kolmogorov-Smirnov statistic: the largest distance of the two empirical distribution functions, 0..1.

    Example:
        >>> ks_distance([1, 2, 3, 4], [3, 4, 5, 6])
        0.5
    """
    first, second = np.sort(first), np.sort(second)
    if not (len(first) and len(second)) or not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(f"Two samples of finite values are needed, got {len(first)} and {len(second)} values.")
    points = np.concatenate([first, second])
    shares = [np.searchsorted(sample, points, side="right") / len(sample) for sample in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


def ks_p_value(distance: float, num_first: int, num_second: int) -> float:
    """The two-sided p value: how often two samples of one distribution are at least so far apart.

    Args:
        distance: from `ks_distance`.
        num_first: size of the first sample.
        num_second: size of the second.

    Returns:
        Exact, by counting the ways in which the two sorted samples can be merged, up to sizes whose product is
        `EXACT_UP_TO`; beyond it Kolmogorov's limit. Ties are treated as if there were none, as is usual.

    Example:
        >>> round(ks_p_value(1.0, 3, 3), 6)  # 2 of the 20 ways to merge two samples of three
        0.1
    """
    m, n = num_first, num_second
    if m * n > EXACT_UP_TO:
        scaled = distance * math.sqrt(m * n / (m + n))
        terms = (2 * (-1) ** (k - 1) * math.exp(-2 * (k * scaled) ** 2) for k in range(1, 101))
        return min(1.0, max(0.0, sum(terms))) if scaled > 0.2 else 1.0
    # Paths from (0, 0) to (m, n) that stay closer than the distance; whole numbers, so that tiny p values are exact.
    limit = round(distance * m * n)
    if limit <= 0:
        return 1.0
    ways = [int(j * m < limit) for j in range(n + 1)]
    for i in range(1, m + 1):
        ways[0] = int(i * n < limit)
        for j in range(1, n + 1):
            ways[j] = ways[j] + ways[j - 1] if abs(i * n - j * m) < limit else 0
    total = math.comb(m + n, n)
    return (total - ways[n]) / total


def forget_quality(unlearned: Sequence[float], retained: Sequence[float]) -> dict[str, MetricValue]:
    """Does the unlearned model treat the forget set like one that never saw it?

    Args:
        unlearned: (n,) truth ratios of the unlearned model on the forget set.
        retained: (m,) those of a model trained on the retain set alone.

    Returns:
        `forget_quality`, the p value of the two-sided Kolmogorov-Smirnov test between the two (large: they cannot be
        told apart), and `ks_distance`, the statistic itself; n counts the unlearned model's items.

        The distance's interval is D +- (e_n + e_m) with e_n = sqrt(ln(2 / 0.025) / (2 n)), by the inequality of
        Dvoretzky, Kiefer and Wolfowitz for each sample: wide, and valid at any size. A p value is no property of the
        models that more items would pin down (it falls to 0 with n for any true difference), so that it has no
        interval of its own: given are the p values of the two ends of the distance's.

    Source: the paper, section 2.2, "forget quality".
    """
    distance, sizes = ks_distance(unlearned, retained), (len(unlearned), len(retained))
    arm = sum(math.sqrt(math.log(2 / 0.025) / (2 * size)) for size in sizes)
    ends = max(0.0, distance - arm), min(1.0, distance + arm)
    p_value = ks_p_value(distance, *sizes)
    p_ends = min(ks_p_value(ends[1], *sizes), p_value), max(ks_p_value(ends[0], *sizes), p_value)
    return {
        "forget_quality": MetricValue(p_value, sizes[0], p_ends, True, 1.0),
        "ks_distance": MetricValue(distance, sizes[0], ends, False, 0.0),
    }


def truth_ratio_score(ratios: np.ndarray, forget: bool, name: str) -> MetricValue:
    """The mean of `truth_ratio_scores` with a bootstrap interval over items; not judged on the forget set.

    A model that never saw the forget set does not score 1 there (`forget_quality` compares with such a model).
    """
    scores = truth_ratio_scores(ratios, forget)
    return mean_score(scores, name, ideal=None if forget else 1.0, higher_is_better=None if forget else True)
