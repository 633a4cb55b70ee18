"""Time and peak memory of a step of every method on a workload, beside fine-tuning, TRL and the naive way."""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from flops import lora_step, utilisation
from peaks import MIB, Peak, peak
from rounds import Ratio, interleaved, ratio
from steps import RANK, Bench, Step
from workloads import Workload, forms_of

from biasunlearn_trainer.saliency.distribution import markdown_table

RIVALS = ("floor", "plain", "naive", "trl")
NAMES = {"floor": "floor SFT", "plain": "plain SFT", "naive": "naive way", "trl": "TRL's DPO"}


@dataclass
class Measured:
    """What was measured of a form.

    Attributes:
        tokens: that the policy reads in a step.
        seconds: median of a step; None where time was not measured.
        peak: of a step; None where memory was not measured.
        time: against each rival, of the same round.
        total: peak memory against each rival.
        over_weights: the same without the policy's weights.
        utilisation: share of the card's peak, for LoRA where that is known.
    """

    tokens: int
    seconds: float | None = None
    peak: Peak | None = None
    time: dict[str, Ratio] = field(default_factory=dict)
    total: dict[str, float] = field(default_factory=dict)
    over_weights: dict[str, float] = field(default_factory=dict)
    utilisation: float | None = None


@dataclass
class Case:
    """A step of ours and the keys of those that it is compared with."""

    step: Hashable
    rivals: dict[str, Hashable]
    shape: tuple[int, int]
    lora: bool


def cases(bench: Bench, methods: list[str] | None) -> tuple[dict[Hashable, Step], dict[str, Case]]:
    """All steps by key, each rival once, and what to compare by the name of the form."""
    steps: dict[Hashable, Step] = {}
    found: dict[str, Case] = {}
    floors: dict[Hashable, Step] = {}
    for name, form, lora in forms_of(bench.workload, methods):
        steps[name], streams, together = bench.ours(form, lora)
        shape = tuple(together["input_ids"].shape)
        # The bounds on it are tight: the floor is taken right beside each form.
        rivals = {"floor": ("floor", name), "plain": ("plain", lora, shape)}
        if rivals["plain"] not in steps:
            floors[lora, shape] = bench.floor(lora, together)
            steps[rivals["plain"]] = bench.plain(lora, together)
            found[f"floor SFT, {shape[0]} rows{', LoRA' * lora}"] = Case(
                rivals["floor"], {"plain": rivals["plain"]}, shape, lora
            )
        steps[rivals["floor"]] = floors[lora, shape]
        if form.equation:
            rivals["naive"] = ("naive", lora, form.equation)
            if rivals["naive"] not in steps:
                steps[rivals["naive"]] = bench.naive(form.equation, lora, streams)
        if form.trl and not bench.workload.shape.image_tokens and lora == form.lora:
            rivals["trl"] = ("trl", form.trl)
            if rivals["trl"] not in steps:
                steps[rivals["trl"]] = bench.trl(form.trl)
        found[name] = Case(name, rivals, shape, lora)
    return steps, dict(sorted(found.items(), key=lambda item: not item[0].startswith("floor")))


def measure(workload: Workload, folder: str, arguments: argparse.Namespace) -> dict[str, Measured]:
    """Measures the forms of a workload, by name."""
    bench = Bench(workload, arguments.device, folder)
    steps, compared = cases(bench, arguments.methods)
    peaks, times = {}, {}
    if "memory" in arguments.parts:
        once = {id(step): peak(step, arguments.device) for step in {id(step): step for step in steps.values()}.values()}
        peaks = {key: once[id(step)] for key, step in steps.items()}
    if "training" in arguments.parts:
        slow = {key for key in steps if key[0] in RIVALS[1:]}
        times = interleaved(steps, arguments.rounds, arguments.device, slow)
    found = {name: outcome(case, times, peaks) for name, case in compared.items()}
    if times and arguments.peak_tflops:
        for name, case in compared.items():
            if case.lora:
                rows, tokens = case.shape
                needed = lora_step(workload.shape, rows, tokens, workload.completion, RANK)
                found[name].utilisation = utilisation(needed, found[name].seconds, arguments.peak_tflops)
    del bench, steps
    gc.collect()
    if arguments.device == "cuda":
        torch.cuda.empty_cache()
    return found


def outcome(case: Case, times: Mapping[Hashable, Mapping[int, float]], peaks: Mapping[Hashable, Peak]) -> Measured:
    """A form beside its rivals."""
    made, rivals = Measured(case.shape[0] * case.shape[1]), case.rivals
    if times:
        made.seconds = statistics.median(times[case.step].values())
        made.time = {kind: ratio(times[case.step], times[key]) for kind, key in rivals.items()}
    if peaks:
        made.peak = own = peaks[case.step]
        made.total = {kind: own.total / peaks[key].total for kind, key in rivals.items()}
        made.over_weights = {kind: own.over_weights / peaks[key].over_weights for kind, key in rivals.items()}
    return made


def time_table(found: Mapping[str, Measured]) -> str:
    """Seconds and ratios, medians and quartiles."""
    used = any(one.utilisation is not None for one in found.values())
    header = ["step", "ms", "tokens/s", *(["model FLOPs"] if used else []), *(f"/ {NAMES[kind]}" for kind in RIVALS)]
    rows = []
    for name, one in found.items():
        cells = [name, f"{1000 * one.seconds:,.0f}", f"{one.tokens / one.seconds:,.0f}"]
        cells += [_or_dash(one.utilisation, "{:.0%}")] if used else []
        rows.append(cells + [str(one.time.get(kind, "-")) for kind in RIVALS])
    return markdown_table(header, rows)


def memory_table(found: Mapping[str, Measured]) -> str:
    """Peaks, and their ratios with and without the weights."""
    header = ["step", "peak MiB", "over weights", *(f"/ {NAMES[kind]}" for kind in RIVALS)]
    rows = []
    for name, one in found.items():
        cells = [name, f"{one.peak.total / MIB:,.0f}", f"{one.peak.over_weights / MIB:,.0f}"]
        rows.append(cells + [_both(one, kind) for kind in RIVALS])
    return markdown_table(header, rows)


def _both(one: Measured, kind: str) -> str:
    return f"{one.total[kind]:.2f}, {one.over_weights[kind]:.2f}" if kind in one.total else "-"


def _or_dash(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)
