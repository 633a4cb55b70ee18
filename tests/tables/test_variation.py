"""Varied settings, seeds with keys of their own, matched forgetting, forked cells."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from biasunlearn_trainer.checkpoints import complete
from biasunlearn_trainer.eval.matched import Point
from biasunlearn_trainer.recipe import RecipeError
from biasunlearn_trainer.tables import parse_table, run_table
from biasunlearn_trainer.tables.cells import status_of
from biasunlearn_trainer.tables.main import main

ROOT = Path(__file__).resolve().parents[2]
MATCHED = {
    "at": {"nll": 1e9},
    "keep": ["nll"],
    "choose_on": "forget_set@train",
    "report_on": "planted",
    "against": "full",
}


def test_every_row_is_crossed_with_what_is_varied(table_file):
    table = parse_table(table_file(vary={"learning_rate": [1e-3, 1e-2], "max_steps": [1, 2]}))
    names = [row.name for row in table.rows]
    assert len(names) == 8 and names[0] == "full.learning_rate-0.001.max_steps-1"
    assert {row.of for row in table.rows} == {"full", "without_retain"}
    cells = {cell.row.name: cell.recipe.training for cell in table.cells}
    assert cells["full.learning_rate-0.01.max_steps-2"].learning_rate == 1e-2
    assert cells["without_retain.learning_rate-0.001.max_steps-2"].max_steps == 2
    assert len(table.cells) == 16


def test_a_seed_may_bring_keys_of_its_own(table_file):
    table = parse_table(table_file(seeds={1: {"max_steps": 3}, 2: {}}))
    assert [cell.recipe.training.max_steps for cell in table.cells] == [3, 4, 3, 4]
    assert [cell.recipe.training.seed for cell in table.cells] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vary": {"learning_rate": 1e-3}}, "`learning_rate` is 0.001, expected a list"),
        ({"vary": {"learning_rate": [1e-3, 1e-3]}}, "list of different values"),
        ({"vary": {"seed": [1, 2]}}, "`seed` cannot be set in a table"),
        ({"vary": {"learning_rat": [1e-3]}}, "learning_rat"),
        ({"seeds": {1: 3}}, "seed 1 is 3, expected recipe keys"),
        ({"seeds": {"one": {}}}, "expected a list of different counts"),
        ({"seeds": {1: {"output_dir": "x"}}}, "`output_dir` cannot be set in a table"),
        ({"matched": {**MATCHED, "against": "fool"}}, "`against` is 'fool'"),
        ({"matched": {**MATCHED, "keep": []}}, "matched: `keep` is []"),
    ],
)
def test_faults_are_named(changes, words, table_file):
    with pytest.raises(RecipeError) as err:
        parse_table(table_file(**changes))
    assert words in str(err.value)


def test_a_table_with_matching_writes_points_and_verdict(table_file, written, tmp_path, monkeypatch):
    def points_of(folder, method, unit, setting, choose_on, report_on):
        assert (choose_on, report_on) == ("forget_set@train", "planted")
        ahead = 0.1 if method == "full" else 0.0
        figures = {"nll": 0.5 + ahead + 0.01 * int(unit)}
        return [Point(method, unit, setting, step, figures, figures) for step in (1, 2)]

    monkeypatch.setattr("biasunlearn_trainer.tables.matched.points_of", points_of)
    changes = {"vary": {"learning_rate": [1e-3, 1e-2]}, "matched": MATCHED, "seeds": [1, 2, 3]}
    run_table(parse_table(table_file(**changes)), written())
    text = (tmp_path / "grid" / "matched.md").read_text()
    assert "From 12 of 12 runs" in text and "| full | 3 of 3 |" in text
    assert "| without_retain | 3 of 3 |" in text and "-0.10 [-0.10, -0.10] (n 3) | keeps less |" in text
    assert (tmp_path / "grid" / "matched.png").stat().st_size > 1000
    with (tmp_path / "grid" / "points.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 2 * 3 * 2 * 2 and {line["setting"] for line in lines} == {
        "learning_rate 0.001",
        "learning_rate 0.01",
    }


def test_forked_cells_give_what_launched_ones_give(table_file, in_process, tmp_path):
    """In a process of its own, since it forks; one cell fails, and its log says why."""
    changes = {"seeds": [1], "rows": {"full": {}, "broken": {"forget_dataset": "absent.jsonl"}}}
    path = table_file(**changes)
    command = [sys.executable, str(ROOT / "recipes" / "table.py"), str(path), "--fork", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    grid = tmp_path / "grid"
    assert "absent.jsonl" in (grid / "broken" / "seed-1" / "error.txt").read_text()
    assert "$ recipes/run.py" in (grid / "full" / "seed-1" / "log.txt").read_text()
    forked = json.loads((grid / "full" / "seed-1" / "results.json").read_text())
    run_table(parse_table(table_file(seeds=[1], rows={"full": {}}, output_dir=str(tmp_path / "again"))), in_process())
    again = json.loads((tmp_path / "again" / "full" / "seed-1" / "results.json").read_text())
    assert forked["after"]["tasks"] == again["after"]["tasks"]


def test_forking_and_launching_are_two_ways(table_file, capsys):
    assert main([str(table_file()), "--fork", "--launcher", "--num_processes 1"]) == 2
    assert "Give one of the two" in capsys.readouterr().err


def test_what_a_testbed_placed_is_no_change(table_file, tmp_path):
    """A run's recipe names the paths of the testbed's sets and tasks; the table names the sets."""
    rows = {"full": {"testbed": "entities", "retain_dataset": "testbed:preserve", "probes": ["entities@report"]}}
    (cell,) = parse_table(table_file(rows=rows, seeds=[1])).cells
    said = cell.recipe.to_yaml().replace("testbed:preserve", "/cache/splits/forget10_0/preserve")
    said = said.replace("entities@report", "entities@report=/cache/splits/forget10_0/report")
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.resolved.yaml").write_text(said)
    (cell.folder / "checkpoint-4").mkdir()
    (cell.folder / "checkpoint-4" / "trainer_state.json").write_text("{}")
    assert str(status_of(cell)) == "missing"  # it was broken off
    (cell.folder / "writing").mkdir()
    complete(cell.folder / "writing", cell.folder / "checkpoint-2", {})
    assert str(status_of(cell)) == "interrupted (checkpoint-2)"
    (cell.folder / "recipe.resolved.yaml").write_text(said.replace("/preserve", "/retain"))
    assert "`retain_dataset` was /cache/splits/forget10_0/retain, now testbed:preserve" in str(status_of(cell))
