"""The command line of a table: plan, run what is missing, write."""

from __future__ import annotations

import argparse
import fnmatch
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from biasunlearn_trainer.recipe import RecipeError
from biasunlearn_trainer.recipe.keys import nearest
from biasunlearn_trainer.tables.cells import is_locked, locked, status_of
from biasunlearn_trainer.tables.forked import ForkError, ForkLauncher
from biasunlearn_trainer.tables.grid import Launcher, Start, run_cells
from biasunlearn_trainer.tables.matched import write_matched
from biasunlearn_trainer.tables.plan import Cell, Table, parse_table
from biasunlearn_trainer.tables.summary import Summary, missing_columns, summarise
from biasunlearn_trainer.tables.write import markdown_lines, write_table

INTERRUPTED = 130  # what a shell reports of a command that Ctrl-C ended


def main(arguments: Sequence[str] | None = None, script: str | Path = "recipes/run.py") -> int:
    """Makes a table from the command line.

    Args:
        arguments: `TABLE.yaml [--only ROW] ...`; the process's own when None.
        script: path of run.py, which runs a cell.

    Returns:
        The exit status: 0 for a whole table, 1 where a cell failed or is still missing or no run has a column, 2 for a
        faulty table or cells of other recipes in its folder, 130 after Ctrl-C.
    """
    options = _parser().parse_args(arguments)
    if options.fork and options.launcher is not None:
        print("Cells are either forked (--fork) or launched (--launcher). Give one of the two.", file=sys.stderr)
        return 2
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        print(
            "A table is made by one process, which starts every cell anew. Launch it with --num_processes 1 and give "
            "the cells' launch as --launcher '--num_processes 2'.",
            file=sys.stderr,
        )
        return 2
    launch = None if options.launcher is None else shlex.split(options.launcher)
    try:
        table = parse_table(options.table)
        chosen = choose(table, options.only) if options.only else list(table.cells)
        overwrite = choose(table, options.overwrite) if options.overwrite else []
        if options.dry_run:
            print(describe_cells(table, chosen, overwrite))
            return 2 if refusals(chosen, overwrite) else 0
        start = ForkLauncher(options.jobs) if options.fork else Launcher(Path(script), launch, options.jobs)
        with _sigterm_as_interrupt():
            summary = run_table(table, start, chosen, overwrite, options.jobs, _command(options))
    except (RecipeError, ForkError) as err:
        print(err, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return INTERRUPTED
    print(f"{markdown_lines(summary)}\n")
    for note in summary.notes:
        print(f"- {note}")
    print(f"Table {table.output_dir / 'table.md'}")
    return 0 if summary.is_complete else 1


def run_table(
    table: Table,
    start: Start,
    chosen: Sequence[Cell] | None = None,
    overwrite: Sequence[Cell] = (),
    jobs: int = 1,
    command: str = "",
) -> Summary:
    """Runs the cells of a table that are not finished and writes the table.

    Args:
        table: what `parse_table` returned.
        start: starts a cell; a `Launcher`.
        chosen: the cells to run; None for all. The table shows the others as they stand.
        overwrite: cells to run anew whatever their folders hold.
        jobs: cells at a time.
        command: what the table names as the command that makes it.

    Returns:
        What was written.

    Raises:
        RecipeError: a chosen cell's folder holds a run of another recipe and is not to be overwritten; nothing ran.
        KeyboardInterrupt: the running cells have been stopped, and the table has been written as far as it goes.
    """
    chosen = list(table.cells if chosen is None else chosen)
    refused = refusals(chosen, overwrite)
    if refused:
        raise RecipeError(refused, f"the folder {table.output_dir}")
    names = {cell.name for cell in overwrite}
    waiting = [cell for cell in chosen if cell.name in names or status_of(cell).kind != "finished"]
    said: set[str] = set()

    def on_finished(cell: Cell) -> list[str]:
        lines = [f"{cell.name}: {line}" for line in missing_columns(table.columns, status_of(cell).results)]
        new = [line for line in lines if line.partition(": ")[2] not in said]
        said.update(line.partition(": ")[2] for line in new)
        return new

    try:
        if waiting:
            run_cells(waiting, start, jobs=jobs, overwrite=names, on_finished=on_finished)
    finally:
        summary = _write(table, command)
    return summary


def _write(table: Table, command: str) -> Summary:
    with locked(table.output_dir, wait=True):
        statuses = {cell: status_of(cell) for cell in table.cells}
        summary = summarise(table, statuses)
        write_table(summary, statuses, command or f"accelerate launch recipes/table.py {table.path}")
        if table.matched is not None:
            write_matched(table, statuses)
    return summary


def choose(table: Table, patterns: Sequence[str]) -> list[Cell]:
    """The cells that patterns name: `ROW`, `ROW/seed-N`, with `*` for any part.

    Raises:
        RecipeError: where a pattern names none.
    """
    faults = []
    for pattern in patterns:
        if not any(_fits(cell, pattern) for cell in table.cells):
            names = [row.name for row in table.rows]
            hint = nearest(pattern, [*names, *(cell.name for cell in table.cells)])
            faults.append(f"command line: no row or cell {pattern!r}{hint}; there are {', '.join(names)}.")
    if faults:
        raise RecipeError(faults, str(table.path))
    return [cell for cell in table.cells if any(_fits(cell, pattern) for pattern in patterns)]


def _fits(cell: Cell, pattern: str) -> bool:
    return fnmatch.fnmatchcase(cell.row.name, pattern) or fnmatch.fnmatchcase(cell.name, pattern)


def refusals(cells: Sequence[Cell], overwrite: Sequence[Cell]) -> list[str]:
    """A sentence for every cell whose folder holds a run of another recipe and is not to be overwritten."""
    statuses = {cell: status_of(cell) for cell in cells if cell not in overwrite}
    return [
        f"{cell.name} is of another recipe: {status.detail}. Give --overwrite {cell.name} to run it anew, or "
        "choose another output_dir."
        for cell, status in statuses.items()
        if status.kind == "changed"
    ]


def describe_cells(table: Table, chosen: Sequence[Cell], overwrite: Sequence[Cell]) -> str:
    """Says of every cell what stands in its folder and what would be done."""
    width = max(len(cell.name) for cell in table.cells)
    lines = [f"{table.title}: {len(table.cells)} cells in {table.output_dir}"]
    for cell in table.cells:
        status = status_of(cell)
        todo = {
            "finished": "kept",
            "missing": "to run",
            "interrupted": "to continue",
            "changed": "refused without --overwrite",
        }[status.kind]
        todo = "running now" if is_locked(cell.folder) else "to run anew" if cell in overwrite else todo
        todo = todo if cell in chosen else "not chosen"
        lines.append(f"  {cell.name:<{width}}  {todo:<14} {status}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="recipes/table.py", description="Runs a grid of recipes where it is missing and writes it as one table."
    )
    parser.add_argument("table", help="the table's YAML")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="run these rows or cells (ROW, ROW/seed-N, with *)")
    parser.add_argument("--overwrite", nargs="+", metavar="ROW", help="run these anew, whatever their folders hold")
    parser.add_argument("--jobs", type=_count, default=1, help="cells at a time, sharing the cores evenly (default 1)")
    parser.add_argument(
        "--launcher", metavar="'ARGUMENTS'", help="start every cell with `accelerate launch ARGUMENTS`, in one string"
    )
    parser.add_argument(
        "--fork",
        action="store_true",
        help="fork the cells from this process, which saves each its imports; for small runs on a CPU",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, say what would be done, run nothing")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)


def _command(options: argparse.Namespace) -> str:
    launcher = ["--launcher", options.launcher] if options.launcher is not None else []
    launcher += ["--fork"] if options.fork else []
    return shlex.join(["accelerate", "launch", "recipes/table.py", options.table, *launcher])


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A terminated grid stops its cells too, as after Ctrl-C."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
