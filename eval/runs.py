"""What finished runs measured on their way, read from their folders."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from biasunlearn_trainer.eval.matched import Point
from biasunlearn_trainer.eval.schema import load_results
from biasunlearn_trainer.run_files import RESOLVED_FILE, RESULTS_FILE, STATE_FILE

SETTINGS = ("learning_rate",)
UNITS = ("seed", "testbed_seed", "testbed_split")
# Keys that say where a run lies or what a testbed filled in, and not what was done.
PLACES = ("output_dir", "oracle_model", "tasks", "probes")
PLACE_PREFIXES = ("save_", "logging_", "log_", "hub_", "overwrite_", "report_to", "run_name", "disable_tqdm")


def figures_of(folder: Path, tasks: Sequence[str]) -> dict[int, dict[str, dict[str, float]]]:
    """By step, by task, the metrics that a run measured.

    Args:
        folder: of a finished run. Steps come from its probes; the last one also from its results.
        tasks: those wanted; a step at which one was not measured is left out.

    Raises:
        ValueError: where the run has no step with all of them.
    """
    history = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["log_history"]
    found: dict[int, dict[str, dict[str, float]]] = {}
    for entry in history:
        for task in tasks:
            prefix = f"probe/{task}/"
            figures = {k.removeprefix(prefix): v for k, v in entry.items() if k.startswith(prefix)}
            if figures:
                found.setdefault(entry["step"], {}).setdefault(task, {}).update(figures)
    last = max((entry["step"] for entry in history), default=0)
    after = load_results(folder / RESULTS_FILE)["after"].tasks
    for task in tasks:
        if task in after and task not in found.get(last, {}):
            found.setdefault(last, {})[task] = {name: value.value for name, value in after[task].metrics.items()}
    whole = {step: figures for step, figures in sorted(found.items()) if set(figures) == set(tasks)}
    if not whole:
        raise ValueError(
            f"{folder}: no step at which {' and '.join(tasks)} were both measured. Name both under `tasks` or `probes`."
        )
    return whole


def points_of(folder: Path, method: str, unit: str, setting: str, choose_on: str, report_on: str) -> list[Point]:
    """The points of a run, step by step."""
    steps = figures_of(folder, (choose_on, report_on))
    return [Point(method, unit, setting, step, f[choose_on], f[report_on]) for step, f in steps.items()]


def find_runs(folders: Sequence[str | Path]) -> list[Path]:
    """Folders of finished runs at or below the given ones.

    Raises:
        ValueError: naming those that hold none.
    """
    runs, empty = [], []
    for folder in map(Path, folders):
        found = sorted({path.parent for path in folder.rglob(RESULTS_FILE) if (path.parent / STATE_FILE).is_file()})
        runs += found
        if not found:
            empty.append(str(folder))
    if empty:
        raise ValueError(f"No finished run ({RESULTS_FILE} beside {STATE_FILE}) in: {', '.join(empty)}.")
    return runs


def read_points(
    runs: Sequence[Path],
    choose_on: str,
    report_on: str,
    settings: Sequence[str] = SETTINGS,
    units: Sequence[str] = UNITS,
) -> list[Point]:
    """The points of runs, told apart by what their recipes have set.

    Args:
        runs: folders of finished runs.
        choose_on: the task that chooses a point.
        report_on: the task that is reported.
        settings: recipe keys that are tuned; runs that differ in them alone are one method on one unit.
        units: recipe keys that the comparison is paired by.

    Returns:
        Points whose method is the recipe's `method`, with whatever else is not alike in all runs of it.
    """
    recipes = {run: _recipe_of(run) for run in runs}
    common = _shared(recipes)
    points = []
    for run, recipe in recipes.items():
        own = {k: v for k, v in recipe.items() if k not in (*settings, *units, "method")}
        said = [f"{key} {value}" for key, value in own.items() if key not in common or common[key] != value]
        method = ", ".join([str(recipe.get("method")), *said])
        unit = ", ".join(f"{key} {recipe[key]}" for key in units if key in recipe)
        setting = ", ".join(f"{key} {recipe[key]}" for key in settings if key in recipe)
        points += points_of(run, method, unit, setting, choose_on, report_on)
    return points


def _recipe_of(run: Path) -> dict[str, Any]:
    """What a run's recipe says of what was done; of a testbed's data the set's name, of its models nothing."""
    recipe = yaml.safe_load((run / RESOLVED_FILE).read_text(encoding="utf-8")) or {}
    said = {key: value for key, value in recipe.items() if key not in PLACES and not key.startswith(PLACE_PREFIXES)}
    if "testbed" not in recipe:
        return said
    return {
        key: Path(value).name if key.endswith("_dataset") else value
        for key, value in said.items()
        if key != "model_name_or_path"
    }


def _shared(recipes: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """Keys with one value in all runs."""
    first, *others = recipes.values()
    return {k: v for k, v in first.items() if all(k in other and other[k] == v for other in others)}
