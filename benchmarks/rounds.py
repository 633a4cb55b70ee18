"""Interleaved measurements: all cases in turn, round after round, so that a busy machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Collection, Hashable, Mapping
from typing import Any, NamedTuple

import torch


class Ratio(NamedTuple):
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def seconds(work: Callable[[], Any], device: str) -> tuple[float, Any]:
    """Processor time of the process, or wall time until a GPU is done, and what came of it."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    start = clock()
    result = work()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start, result


def interleaved(
    cases: Mapping[Hashable, Callable[[], Any]], rounds: int, device: str, seldom: Collection[Hashable] = ()
) -> dict[Hashable, dict[int, float]]:
    """Seconds of each case by round.

    A first round warms up. Each begins with another case, and every second one goes backwards, so that of two cases
    that stand beside each other either is first as often.

    Args:
        cases: what to time.
        rounds: how many count.
        device: `cpu` or `cuda`.
        seldom: cases that take part in every third round only.
    """
    names, times = [*cases], {name: {} for name in cases}
    for number in range(rounds + 1):
        start = number % len(names)
        order = names[start:] + names[:start]
        for name in reversed(order) if number % 2 else order:
            if name in seldom and number % 3 != 1 and number:
                continue
            taken, _ = seconds(cases[name], device)
            if number:
                times[name][number] = taken
    return times


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio:
    """Of two cases' seconds, round by round."""
    ratios = [ours[number] / theirs[number] for number in sorted(ours.keys() & theirs.keys())]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high)
