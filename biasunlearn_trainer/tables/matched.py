"""A table's rows compared at matched forgetting: Markdown, every point as CSV, and the trade-off as a picture."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

from biasunlearn_trainer.eval.matched import Point, compare_matched, matched_markdown
from biasunlearn_trainer.eval.report.tradeoff import build_tradeoff_figure
from biasunlearn_trainer.eval.runs import points_of
from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.tables.cells import Status
from biasunlearn_trainer.tables.plan import Cell, Table

MATCHED_FILE, FIGURE_FILE, POINTS_FILE = "matched.md", "matched.png", "points.csv"


def write_matched(table: Table, statuses: Mapping[Cell, Status]) -> Path | None:
    """Writes `matched.md`, `matched.png` and `points.csv` of the finished cells.

    Args:
        table: with `matched`; a row is a method, what `vary` sets its settings, a seed its unit.
        statuses: of every cell.

    Returns:
        The path of `matched.md`; None where no cell has finished.

    Raises:
        ValueError: where a finished cell lacks one of the two tasks.
    """
    matching, points = table.matched, list(_points(table, statuses))
    if not points:
        return None
    if matching.against not in {point.method for point in points}:
        matching = replace(matching, against=None)  # none of its cells has finished yet
    comparisons = compare_matched(points, matching)
    folder = table.output_dir
    write_text(folder / POINTS_FILE, _csv(points))
    partial = folder / f"{FIGURE_FILE}.partial"
    build_tradeoff_figure(points, comparisons, matching).savefig(partial, format="png")
    os.replace(partial, folder / FIGURE_FILE)
    finished = sum(1 for status in statuses.values() if status.results)
    parts = [
        f"# {table.title}, at matched forgetting",
        f"From {finished} of {len(table.cells)} runs. Every point: [{POINTS_FILE}]({POINTS_FILE}).",
        matched_markdown(comparisons, matching),
        f"![The trade-off]({FIGURE_FILE})",
    ]
    write_text(folder / MATCHED_FILE, "\n\n".join(parts) + "\n")
    return folder / MATCHED_FILE


def _points(table: Table, statuses: Mapping[Cell, Status]) -> Iterator[Point]:
    for cell in table.cells:
        if statuses[cell].results:
            setting = ", ".join(f"{key} {value}" for key, value in cell.row.varied.items())
            matching = table.matched
            yield from points_of(
                cell.folder, cell.row.of, str(cell.seed), setting, matching.choose_on, matching.report_on
            )


def _csv(points: list[Point]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "unit", "setting", "step", "task", "metric", "value"])
    for point in points:
        record = asdict(point)
        for task in ("chosen_on", "reported"):
            for metric, value in record[task].items():
                writer.writerow([point.method, point.unit, point.setting, point.step, task, metric, value])
    return text.getvalue()
