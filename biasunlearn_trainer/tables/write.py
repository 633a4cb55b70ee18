"""Writes a table: Markdown for readers, two CSV files for programs, a figure."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from biasunlearn_trainer.eval.findings import interval, number
from biasunlearn_trainer.eval.report.table import NOTES, cell
from biasunlearn_trainer.eval.schema import EvalResult, write_text
from biasunlearn_trainer.tables.cells import Status
from biasunlearn_trainer.tables.figure import build_table_figure
from biasunlearn_trainer.tables.plan import Cell
from biasunlearn_trainer.tables.summary import Estimate, Line, Summary, rows_described

TABLE_FILE, FIGURE_FILE, CSV_FILE, CELLS_FILE = "table.md", "table.png", "table.csv", "cells.csv"
TABLE_COLUMNS = (
    "row", "state", "column", "task", "group", "metric", "change",
    "value", "low", "high", "seed_sd", "num_seeds", "n_low", "n_high", "ideal",
)  # fmt: skip
CELLS_COLUMNS = ("row", "seed", "task", "group", "metric", "state", "value", "n", "low", "high", "ideal", "folder")


def write_table(summary: Summary, statuses: Mapping[Cell, Status], command: str) -> Path:
    """Writes `table.md`, `table.csv`, `cells.csv` and `table.png` into the table's folder.

    Args:
        summary: the figures.
        statuses: of every cell, for `cells.csv`, which holds every figure of every finished run.
        command: what makes this table, named in it.

    Returns:
        The path of `table.md`.
    """
    folder = summary.table.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / CSV_FILE, _csv(TABLE_COLUMNS, _table_records(summary)))
    write_text(folder / CELLS_FILE, _csv(CELLS_COLUMNS, _cell_records(statuses)))
    partial = folder / f"{FIGURE_FILE}.partial"
    build_table_figure(summary).savefig(partial, format="png")
    os.replace(partial, folder / FIGURE_FILE)
    write_text(folder / TABLE_FILE, table_markdown(summary, command))
    return folder / TABLE_FILE


def table_markdown(summary: Summary, command: str) -> str:
    """The text of `table.md`: what it is, the figures, the plot, what each row is, what has to be known."""
    table = summary.table
    parts = [
        f"# {' '.join(table.title.split())}",
        f"Written by\n\n    {command}",
        _caption(tuple(table.seeds), any(table.seeds.values())),
        markdown_lines(summary),
        f"![{cell(table.title)}]({FIGURE_FILE})",
        "Rows:\n" + "".join(f"\n- {cell(row.label)}: {cell(text)}" for row, text in rows_described(table)),
        "Columns:\n" + "".join(f"\n- {text}" for text in _columns_described(summary)),
    ]
    if summary.notes:
        parts.append("To be known:\n" + "".join(f"\n- {cell(note)}" for note in summary.notes))
    parts.append(
        f"Every figure of every run, with its folder: [{CELLS_FILE}]({CELLS_FILE}). This table for programs: "
        f"[{CSV_FILE}]({CSV_FILE})."
    )
    return "\n\n".join(parts) + "\n"


def _caption(seeds: Sequence[int], have_own_keys: bool) -> str:
    if len(seeds) == 1:
        return f"Every figure is of one run (seed {seeds[0]}), with its 95 % interval over items in brackets."
    if have_own_keys:
        return (
            f"Every figure is a mean over {len(seeds)} units (seeds {', '.join(map(str, seeds))}, each with its own "
            "settings), with the 95 % interval over items in brackets (its ends averaged over units) and ± the "
            "standard deviation between units."
        )
    return (
        f"Every figure is a mean over {len(seeds)} seeds ({', '.join(map(str, seeds))}), with the 95 % interval over "
        "items in brackets (its ends averaged over seeds) and ± the standard deviation between seeds. All seeds are "
        "measured on the same items, so neither of the two contains the other."
    )


def markdown_lines(summary: Summary) -> str:
    """The figures as a Markdown table."""
    columns = summary.table.columns
    header = ["", *(cell(column.name) for column in columns)]
    lines = [header, ["---"] + ["---:"] * len(columns)]
    for line in summary.lines:
        cells = [estimate_text(line.estimates[i], summary.scale(i), c.change) for i, c in enumerate(columns)]
        lines.append([cell(line_label(line)), *(text or line.missing for text in cells)])
    ideals = [summary.of_column(i, "ideal") for i in range(len(columns))]
    if any(len(ideal) == 1 for ideal in ideals):
        shown = [number(ideal[0], summary.scale(i)) if len(ideal) == 1 else "" for i, ideal in enumerate(ideals)]
        lines.append(["ideal", *shown])
    lines.append(["n", *(_counts(summary, i) for i in range(len(columns)))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def line_label(line: Line) -> str:
    """The name of a line, and how many of its seeds it holds where that is not all."""
    found, asked = line.num_seeds
    return f"{line.label} ({found} of {asked} seeds)" if 0 < found < asked else line.label


def estimate_text(estimate: Estimate | None, scale: float, is_change: bool = False) -> str:
    """A figure as `0.98 [0.95, 0.99] ± 0.01`, a change with its sign; "" for none."""
    if estimate is None:
        return ""
    value = f"{'+' if is_change and estimate.value > 0 else ''}{number(estimate.value, scale)}"
    spread = "" if estimate.seed_sd is None else f"± {number(estimate.seed_sd, scale)}"
    return f"{value} {interval(estimate.to_dict(), scale)} {spread}".rstrip()


def _counts(summary: Summary, column: int) -> str:
    counts = [count for pair in summary.of_column(column, "n") for count in pair]
    if not counts:
        return ""
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"


def _columns_described(summary: Summary) -> list[str]:
    said = []
    for column in summary.table.columns:
        group = f", group `{cell(column.group)}`" if column.group is not None else ""
        meaning = f": {NOTES[column.metric]}" if column.metric in NOTES else ""
        what = "after minus before of " if column.change else ""
        said.append(f"{cell(column.name)}: {what}`{cell(column.metric)}` of `{cell(column.task)}`{group}{meaning}")
    return said


def _table_records(summary: Summary) -> Iterable[Sequence[Any]]:
    for line in summary.lines:
        for column, found in zip(summary.table.columns, line.estimates, strict=True):
            names = [line.label, line.state, column.name, column.task, column.group, column.metric, column.change]
            if found:
                ends = [*found.ci95, found.seed_sd, len(found.values), *found.n, found.ideal]
                yield [*names, found.value, *ends]


def _cell_records(statuses: Mapping[Cell, Status]) -> Iterable[Sequence[Any]]:
    for run, status in statuses.items():
        for state, result in (status.results or {}).items():
            for task, group, metric, entry in _entries(result):
                figures = [entry.value, entry.n, *entry.ci95, entry.ideal]
                yield [run.row.name, run.seed, task, group, metric, state, *figures, run.name]


def _entries(result: EvalResult) -> Iterable[tuple]:
    for task, found in result.tasks.items():
        for group, metrics in [(None, found.metrics), *found.groups.items()]:
            for metric, entry in metrics.items():
                yield task, group, metric, entry


def _csv(header: Sequence[str], records: Iterable[Sequence[Any]]) -> str:
    """Whole numbers and shortest exact decimals; nothing is rounded, and what there is not is left empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(records)
    return text.getvalue()
