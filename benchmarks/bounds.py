"""What training, evaluation and the Fisher must reach, and what was measured of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from biasunlearn_trainer.saliency.distribution import markdown_table

if TYPE_CHECKING:
    from evaluation import Outcome as EvaluationOutcome
    from fisher import Outcome as FisherOutcome
    from training import Measured

Measures = Mapping[str, "Measured"]


@dataclass(frozen=True)
class Bound:
    """A line of the table.

    Attributes:
        work: what is measured.
        limit: the bound.
        value: what was measured; None where it was not.
        at_least: whether more is better.
        unit: `x`, `%` or `bytes`.
        note: what stands behind the value, such as its quartiles.
    """

    work: str
    limit: float
    value: float | None
    at_least: bool = False
    unit: str = "x"
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def cells(self) -> list[str]:
        """Work, bound, measured, met."""
        shown = {"x": "{:.2f}x", "%": "{:.0f} %", "bytes": "{:,.0f} bytes"}[self.unit]
        value = "not measured" if self.value is None else f"{shown.format(self.value)} {self.note}".strip()
        limit = f"at {'least' if self.at_least else 'most'} {shown.format(self.limit)}"
        return [self.work, limit, value, {True: "yes", False: "**no**", None: "-"}[self.met]]


@dataclass(frozen=True)
class Comparison:
    """A bound on a form against a rival: its time, its peak memory, or the peak over the policy's weights."""

    work: str
    workload: str
    form: str
    rival: str
    limit: float
    of: str = "time"


NPO, NPO_KL = "NPO + retain, precomputed", "NPO + KL, hidden states"
COMPARISONS = (
    Comparison("GA vs floor SFT, time", "text", "GA", "floor", 1.05),
    Comparison("GA_Diff vs floor SFT, time", "text", "GA_Diff", "floor", 1.05),
    Comparison("NPO + retain, precomputed, vs floor SFT, time", "text", NPO, "floor", 1.05),
    Comparison("the same vs plain SFT, time", "text", NPO, "plain", 0.75),
    Comparison("NPO + retain, `adapter`, vs floor LoRA SFT, time", "text", "NPO + retain, adapter", "floor", 1.30),
    Comparison("NPO alone, `adapter`, vs floor LoRA SFT, time", "text", "NPO, adapter", "floor", 1.55),
    Comparison("KL_Min, hidden states, vs floor SFT, time", "text", "KL_Min, hidden states", "floor", 1.15),
    Comparison("BiasUnlearn, hidden states, vs floor SFT, time", "text", "BiasUnlearn, hidden states", "floor", 1.15),
    Comparison("MMUnlearner, mask ready, vs floor SFT, time", "text", "MMUnlearner, random mask", "floor", 1.15),
    Comparison("the same on pictures, what it is for", "llava", "MMUnlearner, random mask", "floor", 1.15),
    Comparison("NPO + retain vs the naive way, time", "text", NPO, "naive", 0.45),
    Comparison("NPO + retain vs the naive way, peak memory over weights", "text", NPO, "naive", 0.50, "over_weights"),
    Comparison("NPO + KL vs the naive way, time", "text", NPO_KL, "naive", 0.35),
    Comparison("NPO + KL vs the naive way, peak memory over weights", "text", NPO_KL, "naive", 0.45, "over_weights"),
    Comparison(
        "completion-only head vs full logits, SFT, memory", "llava", "floor SFT, 8 rows", "plain", 0.60, "over_weights"
    ),
)


def training_bounds(found: Mapping[str, Measures]) -> list[Bound]:
    """The bounds on training.

    Args:
        found: what was measured of each workload, by form.
    """
    bounds = [compared(c, found.get(c.workload, {}).get(c.form)) for c in COMPARISONS]
    lora = {name: one.total["floor"] for name, one in found.get("50m", {}).items() if "floor" in one.total}
    worst = max(lora, key=lora.get, default="")
    work = "peak tensor bytes of any LoRA method vs floor LoRA SFT, 58 M weights"
    bounds.append(Bound(work, 1.10, lora.get(worst), note=f"({worst})" if worst else ""))
    on_gpu = found.get("7b", {}).get(NPO)
    share = None if on_gpu is None or on_gpu.utilisation is None else 100 * on_gpu.utilisation
    work = "LLaVA-1.5-7B shape, NPO + retain, LoRA, model-FLOPs utilisation"
    return [*bounds, Bound(work, 40, share, at_least=True, unit="%")]


def compared(comparison: Comparison, measured: Measured | None) -> Bound:
    """The bound on one form against one rival."""
    found = None if measured is None else getattr(measured, comparison.of).get(comparison.rival)
    work = f"{comparison.work} ({comparison.workload})"
    if found is None:
        return Bound(work, comparison.limit, None)
    if comparison.of != "time":
        return Bound(work, comparison.limit, found)
    return Bound(work, comparison.limit, found.median, note=f"({found.low:.2f}-{found.high:.2f})")


def bounds_table(bounds: list[Bound]) -> str:
    """All of them."""
    return markdown_table(["work", "bound", "measured", "met"], [bound.cells() for bound in bounds])


def evaluation_bounds(found: Sequence[EvaluationOutcome]) -> list[Bound]:
    """The bounds on the published sets, of the model that saves least where there are several."""
    bounds = []
    for name, times in (("stereoset", 4), ("crows_pairs", 4), ("bbq", 6)):
        lines = [line for line in found if line.task.startswith(name)]
        faster = min((line.faster for line in lines), default=None)
        share = max((100 * line.share for line in lines), default=None)
        apart = max((line.difference for line in lines), default=0)
        note = f"(scores within {apart:.0e})" if lines else ""
        bounds.append(Bound(f"{name} vs one sentence per forward pass, times faster", times, faster, True, note=note))
        bounds.append(Bound(f"{name}, tokens forwarded of the naive way's", 60, share, unit="%"))
    return bounds


def fisher_bounds(found: Sequence[FisherOutcome]) -> list[Bound]:
    """Per-sample against per-batch, of the case that is slowest."""
    work = "Fisher, per sample vs per batch, time"
    if not found:
        return [Bound(work, 1.3, None)]
    slow = max(found, key=lambda one: one.time["per sample"])
    return [Bound(work, 1.3, slow.time["per sample"].median, note=f"({slow.case})")]


def growth_bounds(found: Mapping[str, tuple[float, float]]) -> list[Bound]:
    """Linear is as long for each row, flat is next to nothing for it: of the stages, by name, the worst."""
    slow, large = max(found, key=lambda name: found[name][0]), max(found, key=lambda name: found[name][1])
    return [
        Bound("100,000 vs 10,000 rows, time a row", 1.25, found[slow][0], note=f"({slow})"),
        Bound("memory of a further row", 1024, found[large][1], unit="bytes", note=f"({large})"),
    ]
