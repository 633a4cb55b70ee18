"""Means over seeds by hand, what stands in a table, and where each figure comes from."""

import csv
import itertools
import json
import math
from pathlib import Path

import pytest

from biasunlearn_trainer.eval.schema import EvalResult, MetricValue, TaskResult
from biasunlearn_trainer.tables.cells import Status
from biasunlearn_trainer.tables.figure import build_table_figure
from biasunlearn_trainer.tables.plan import Cell, Column, Row, Table
from biasunlearn_trainer.tables.summary import change, estimate, missing_columns, summarise
from biasunlearn_trainer.tables.write import markdown_lines, write_table

SS = {"higher_is_better": None, "ideal": 50.0}


def result(ss, half=4.0, model="planted", n=731, **tasks):
    metrics = {
        "ss": MetricValue(ss, n, (ss - half, ss + half), **SS),
        "lms": MetricValue(96.0, n, (95.0, 97.0), True, 100.0),
    }
    groups = {"gender": {"ss": MetricValue(ss + 1, 80, (ss - 9, ss + 9), **SS)}}
    return EvalResult(model=model, tasks={"stereoset@report": TaskResult(metrics, groups)})


def run_of(after, before=76.0, model="planted", **options):
    return {"before": result(before, model=model), "after": result(after, model="out", **options)}


COLUMNS = (
    Column("stereoset@report", "ss", label="SS"),
    Column("stereoset@report", "ss", group="gender", label="SS gender"),
    Column("stereoset@report", "ss", change=True, label="SS change"),
)


@pytest.fixture
def table(tmp_path):
    rows = [Row(name, name.upper(), Path("base.yaml"), {"beta": 0.1}, {}) for name in ("full", "part")]
    cells = tuple(Cell(row, s, tmp_path / "grid" / row.name / f"seed-{s}", "", None) for row in rows for s in (1, 2, 3))
    seeds = {1: {}, 2: {}, 3: {}}
    return Table(Path("t.yaml"), "SS | by part", tmp_path / "grid", seeds, COLUMNS, None, cells, True, False)


def statuses_of(table, **figures):
    """Statuses with the SS after unlearning of each cell by row; None for a cell that failed."""
    values = {cell: figures[cell.row.name][cell.seed - 1] for cell in table.cells}
    return {
        cell: Status("finished", results=run_of(value))
        if value is not None
        else Status("missing", error="exit status 1")
        for cell, value in values.items()
    }


def test_mean_interval_and_spread_by_hand():
    entries = [MetricValue(v, n, (v - a, v + 4), **SS) for v, n, a in ((50, 731, 2), (53, 731, 3), (56, 700, 7))]
    found = estimate(entries)
    assert found.value == 53.0
    assert found.ci95 == (49.0, 57.0)  # (48 + 50 + 49) / 3 and (54 + 57 + 60) / 3
    assert found.seed_sd == 3.0  # sqrt((9 + 0 + 9) / 2)
    assert found.n == (700, 731) and found.values == (50, 53, 56) and found.ideal == 50.0


def test_item_interval_does_not_shrink_with_seeds_and_one_seed_keeps_its_own():
    entry = MetricValue(0.9, 100, (0.82, 0.95))
    assert estimate([entry]).ci95 == (0.82, 0.95) and estimate([entry]).seed_sd is None
    many = estimate([entry] * 10)
    assert many.ci95 == pytest.approx((0.82, 0.95)) and many.seed_sd == 0.0


def test_change_adds_the_arms_in_squares():
    before, after = MetricValue(76.0, 731, (72.0, 79.0)), MetricValue(53.0, 731, (50.0, 57.0))
    found = change(before, after)
    assert found.value == -23.0
    assert found.ci95 == pytest.approx((-23 - math.hypot(3, 3), -23 + math.hypot(4, 4)))
    assert found.ideal is None


def test_markdown_shows_means_failures_and_counts(table):
    statuses = statuses_of(table, full=(50.0, 53.0, 56.0), part=(60.0, None, None))
    text = markdown_lines(summarise(table, statuses))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.split("\n")]
    assert lines[0] == ["", "SS", "SS gender", "SS change"]
    assert lines[2] == ["before", "76.0 [72.0, 80.0]", "77.0 [67.0, 85.0]", "-"]
    assert lines[3] == [
        "FULL",
        "53.0 [49.0, 57.0] ± 3.0",
        "54.0 [44.0, 62.0] ± 3.0",
        "-23.0 [-28.7, -17.3] ± 3.0",
    ]
    assert lines[4][:2] == ["PART (1 of 3 seeds)", "60.0 [56.0, 64.0]"]
    assert lines[5] == ["ideal", "50.0", "50.0", ""]
    assert lines[6] == ["n", "731", "80", "731"]


def test_a_row_without_any_run_says_why(table):
    summary = summarise(table, statuses_of(table, full=(50.0, 53.0, 56.0), part=(None, None, None)))
    assert summary.lines[-1].missing == "failed" and not summary.is_complete
    assert any("part/seed-2: failed, exit status 1" in note for note in summary.notes)
    missing = {cell: Status("missing") for cell in table.cells}
    assert [line.missing for line in summarise(table, missing).lines] == ["not run", "not run"]
    changed = {cell: Status("changed", "`beta` was 0.1, now 0.4") for cell in table.cells}
    assert "`beta` was 0.1, now 0.4" in "".join(summarise(table, changed).notes)
    build_table_figure(summarise(table, missing))  # a table without any figure can be drawn


def test_before_has_a_line_for_each_model_and_names_disagreement(table):
    statuses = statuses_of(table, full=(50.0, 53.0, 56.0), part=(60.0, 61.0, 62.0))
    assert summarise(table, statuses).notes == () and summarise(table, statuses).is_complete
    parts = [cell for cell in table.cells if cell.row.name == "part"]
    for cell in parts:
        statuses[cell] = Status("finished", results=run_of(60.0, before=81.0, model="another"))
    labels = [line.label for line in summarise(table, statuses).lines]
    assert labels == ["before (FULL)", "before (PART)", "FULL", "PART"]
    statuses[parts[0]] = Status("finished", results=run_of(60.0, before=82.0, model="another"))
    notes = " ".join(summarise(table, statuses).notes)
    assert "SS is 81 in part/seed-2 and 82 in part/seed-1" in notes


def test_unknown_columns_are_told_what_there_is():
    wrong = [
        Column("stereoset", "ss"),
        Column("stereoset@report", "sss"),
        Column("stereoset@report", "ss", group="sex"),
    ]
    said = missing_columns(wrong, run_of(50.0))
    assert ["no task 'stereoset'" in said[0], "there are stereoset@report" in said[0]] == [True, True]
    assert "no metric 'sss'; there are lms, ss." in said[1]
    assert "no group 'sex'; there are gender." in said[2]
    assert missing_columns(COLUMNS, run_of(50.0)) == []


def test_column_that_no_run_has_makes_the_table_incomplete(table):
    statuses = statuses_of(table, full=(50.0, 53.0, 56.0), part=(60.0, 61.0, 62.0))
    wrong = Table(**{**vars(table), "columns": (*COLUMNS, Column("stereoset@report", "sss"))})
    summary = summarise(wrong, statuses)
    assert not summary.is_complete and "no metric 'sss'" in summary.notes[-1]


def test_cells_that_ran_with_other_versions_or_rows_are_named(table):
    statuses = statuses_of(table, full=(50.0, 53.0, 56.0), part=(60.0, 61.0, 62.0))
    for cell in table.cells:
        cell.folder.mkdir(parents=True)
        torch = "2.14.0" if cell.name == "part/seed-3" else "2.13.0"
        said = {"packages": {"torch": torch}, "model": {"source": "m", "fingerprint": "a"}, "data": {}}
        (cell.folder / "environment.json").write_text(json.dumps(said))
    (note,) = summarise(table, statuses).notes
    assert "version of torch" in note and "2.14.0 in 1 (first part/seed-3)" in note


def test_files_hold_every_figure_with_its_folder(table):
    statuses = statuses_of(table, full=(50.0, 53.0, 56.0), part=(60.0, 61.0, None))
    path = write_table(summarise(table, statuses), statuses, "accelerate launch recipes/table.py t.yaml")
    text = path.read_text()
    for words in (
        "# SS | by part",
        "    accelerate launch recipes/table.py t.yaml",
        "](table.png)",
        "- FULL: base.yaml",
    ):
        assert words in text
    with (path.parent / "cells.csv").open() as file:
        records = list(csv.DictReader(file))
    chosen = {"row": "full", "seed": "2", "metric": "ss", "group": "", "state": "after"}
    (one,) = [record for record in records if chosen.items() <= record.items()]
    assert (float(one["value"]), float(one["low"]), float(one["high"]), one["n"]) == (53.0, 49.0, 57.0, "731")
    assert one["folder"] == "full/seed-2" and one["task"] == "stereoset@report"
    assert len(records) == 5 * 2 * 3  # finished cells, states, metrics with their groups
    with (path.parent / "table.csv").open() as file:
        rows = [record for record in csv.DictReader(file) if record["row"] == "PART" and record["column"] == "SS"]
    assert float(rows[0]["value"]) == 60.5 and rows[0]["num_seeds"] == "2"
    assert float(rows[0]["seed_sd"]) == pytest.approx(math.sqrt(0.5))
    assert (path.parent / "table.png").stat().st_size > 10_000


def test_figure_places_figures_on_their_rows_and_overlaps_nothing(table):
    statuses = statuses_of(table, full=(50.0, 53.0, 56.0), part=(None, None, None))
    summary = summarise(table, statuses)
    figure = build_table_figure(summary)
    axes = figure.axes[0]
    drawn = {(tuple(line.get_xdata()), tuple(line.get_ydata())) for line in axes.lines}
    assert ((53.0,), (1,)) in drawn and ((49.0, 57.0), (1, 1)) in drawn
    assert [text.get_text() for text in axes.texts] == ["76.0", "53.0", "failed"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before", "FULL", "PART"]
    assert figure.axes[2].get_xlim()[1] > 0  # no change is in sight
    figure.canvas.draw()
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    assert all(left.x1 <= right.x0 for left, right in itertools.pairwise(boxes))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
