"""Does unlearning one bias type change another? The cross-bias matrix of several runs.

    python -m biasunlearn_trainer.eval.cross_bias race=out/race gender=out/gender age=out/age \
        --task debias_ic@report --figure cross_bias.png

Each LABEL=RUN is a run that unlearned the rows of one bias type; RUN is its folder or a results file. Row i, column j
of the matrix is the reliability on type j after unlearning type i. On the diagonal stands what was unlearned, off it
what carried over.

Source: "Debiasing Multimodal Large Language Models via Model Editing", section 4.3 and table 3.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasunlearn_trainer.eval.schema import EvalResult, MetricValue, load_results, write_text
from biasunlearn_trainer.run_files import RESULTS_FILE

BEFORE = "before"


@dataclass(frozen=True)
class CrossBias:
    """A matrix of one metric.

    Attributes:
        task: whose metric it is.
        metric: its name.
        unlearned: the rows: the bias type that each run unlearned, in the order of the runs.
        measured: the columns: bias types that were measured, those that were unlearned first.
        entries: by (unlearned, measured); what a run did not measure is missing.
        before: by measured type, the model before unlearning; empty where no run holds it.
    """

    task: str
    metric: str
    unlearned: tuple[str, ...]
    measured: tuple[str, ...]
    entries: Mapping[tuple[str, str], MetricValue]
    before: Mapping[str, MetricValue]

    def change(self, unlearned: str, measured: str) -> float | None:
        """How far unlearning one type moved the metric on another; None where one of the two is missing."""
        after, before = self.entries.get((unlearned, measured)), self.before.get(measured)
        return None if after is None or before is None else after.value - before.value

    def carried_over(self, unlearned: str) -> float | None:
        """The mean metric on the other types, each type counting the same; None where none was measured."""
        others = [m for m in self.measured if m != unlearned and (unlearned, m) in self.entries]
        return sum(self.entries[unlearned, m].value for m in others) / len(others) if others else None

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = {
            u: {m: self.entries[u, m].to_dict() for m in self.measured if (u, m) in self.entries}
            for u in self.unlearned
        }
        before = {m: value.to_dict() for m, value in self.before.items()}
        return {"task": self.task, "metric": self.metric, "before": before, "after": rows}


def cross_bias_matrix(
    runs: Mapping[str, EvalResult], task: str, metric: str = "reliability", before: EvalResult | None = None
) -> CrossBias:
    """The matrix of several results.

    Args:
        runs: by the bias type that was unlearned, the result after it.
        task: key of the task, for instance debias_ic@report; its groups are bias types.
        metric: of the groups.
        before: the result of the model before unlearning.

    Raises:
        ValueError: no runs, or a run that did not measure the metric on any bias type; all such runs are named.
    """
    if not runs:
        raise ValueError("A cross-bias matrix needs at least one run, LABEL=RUN.")
    rows = {label: _by_type(result, task, metric) for label, result in runs.items()}
    faults = [_fault(label, runs[label], task, metric) for label, row in rows.items() if not row]
    if faults:
        raise ValueError("\n".join(faults))
    found = dict.fromkeys(name for row in rows.values() for name in row)
    measured = [name for name in rows if name in found] + sorted(name for name in found if name not in rows)
    entries = {(label, name): value for label, row in rows.items() for name, value in row.items()}
    known = _by_type(before, task, metric) if before is not None else {}
    known = {name: known[name] for name in measured if name in known}
    return CrossBias(task, metric, tuple(rows), tuple(measured), entries, known)


def _by_type(result: EvalResult, task: str, metric: str) -> dict[str, MetricValue]:
    groups = result.tasks[task].groups if task in result.tasks else {}
    return {name: metrics[metric] for name, metrics in groups.items() if metric in metrics}


def _fault(label: str, result: EvalResult, task: str, metric: str) -> str:
    if task not in result.tasks:
        return f"{label}: there is no task {task!r}; there are: {', '.join(result.tasks) or 'none'}."
    there = sorted({name for metrics in result.tasks[task].groups.values() for name in metrics})
    return f"{label}: {task} has no {metric!r} by bias type; there are: {', '.join(there) or 'none'}."


def cross_bias_markdown(matrix: CrossBias) -> str:
    """The matrix as a Markdown table: value, 95 % interval and n; what was unlearned is bold."""
    head = ["unlearned", *matrix.measured, "mean of the others"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    if matrix.before:
        cells = [_cell(matrix.before.get(name)) for name in matrix.measured]
        lines.append("| " + " | ".join(["nothing (before)", *cells, ""]) + " |")
    for label in matrix.unlearned:
        cells = [_cell(matrix.entries.get((label, name)), bold=name == label) for name in matrix.measured]
        others = matrix.carried_over(label)
        lines.append("| " + " | ".join([label, *cells, "" if others is None else f"{others:.2f}"]) + " |")
    return f"{matrix.task}: {matrix.metric} by bias type\n\n" + "\n".join(lines)


def _cell(value: MetricValue | None, bold: bool = False) -> str:
    if value is None:
        return ""
    shown = f"**{value.value:.2f}**" if bold else f"{value.value:.2f}"
    return f"{shown} [{value.ci95[0]:.2f}, {value.ci95[1]:.2f}], n = {value.n}"


def read_runs(texts: Sequence[str]) -> tuple[dict[str, EvalResult], EvalResult | None]:
    """Reads LABEL=RUN.

    Returns:
        The results after unlearning by label, and one from before it, where a run has it.

    Raises:
        ValueError: a text without label or run, a label twice, a file that is no result.
        FileNotFoundError: no such run.
    """
    runs, before = {}, None
    for text in texts:
        label, equals, place = text.partition("=")
        if not label or not equals or not place:
            raise ValueError(f"{text!r}: expected LABEL=RUN, for instance race=out/race.")
        if label in runs:
            raise ValueError(f"{label!r} is given twice; one run a bias type.")
        path = Path(place).expanduser()
        path = path / RESULTS_FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{label}: there is no result at {path}.")
        results = load_results(path)
        if isinstance(results, EvalResult):
            runs[label] = results
        elif "after" in results:
            runs[label], before = results["after"], before or results.get(BEFORE)
        else:
            raise ValueError(f"{path} holds no result after unlearning; it has: {', '.join(results)}.")
    return runs, before


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 with the reason on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.eval.cross_bias", description="Reliability on one type after another."
    )
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN", help="bias type that was unlearned, folder or file")
    parser.add_argument("--task", required=True, help="key of the task, for instance debias_ic@report")
    parser.add_argument("--metric", default="reliability", help="of the task's bias types (reliability)")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the matrix too")
    parser.add_argument("--output", type=Path, metavar="JSON", help="write the matrix too")
    options = parser.parse_args(arguments)
    try:
        runs, before = read_runs(options.runs)
        matrix = cross_bias_matrix(runs, options.task, options.metric, before)
        print(cross_bias_markdown(matrix))
        if options.output:
            write_text(options.output, json.dumps(matrix.to_dict(), indent=2) + "\n")
        if options.figure:
            from biasunlearn_trainer.eval.report.cross_bias import build_cross_bias_figure

            build_cross_bias_figure(matrix).savefig(options.figure)
            print(f"\nPicture {options.figure}")
    except (ValueError, OSError) as err:
        print(err, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
