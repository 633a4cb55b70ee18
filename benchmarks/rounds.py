"""Interleaved measurements: all cases in turn, round after round, so that a busy machine disturbs them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
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


def interleaved(cases: Mapping[Hashable, Callable[[], Any]], rounds: int, device: str) -> dict[Hashable, list[float]]:
    """Seconds of each case in each round; a first round warms up. Each round begins with another case."""
    names, times = [*cases], {name: [] for name in cases}
    for number in range(rounds + 1):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            taken, _ = seconds(cases[name], device)
            if number:
                times[name].append(taken)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of two cases' seconds, round by round."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Ratio(median, low, high)
