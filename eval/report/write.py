"""Writes the report of a run: results.json, report.md, report.png and the pictures of the cases."""

import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biasunlearn_trainer.eval.compare import compare, verdicts
from biasunlearn_trainer.eval.findings import groups_of, tasks_of
from biasunlearn_trainer.eval.generalisation import Gap, generalisation_gaps
from biasunlearn_trainer.eval.report.bias_course import course_markdown, read_course
from biasunlearn_trainer.eval.report.cases import NUM_CASES, cases_markdown, save_pictures, select_cases
from biasunlearn_trainer.eval.report.figure import draw_report
from biasunlearn_trainer.eval.report.table import gap_table, groups_table, markdown_table, notes, paired_table
from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.run_files import CASES_FOLDER, FIGURE_FILE, REPORT_FILE, RESULTS_FILE

logger = logging.getLogger(__name__)

# A longer table of item-by-item changes is no longer read.
MAX_PAIRED_ROWS = 40


def write_report(
    output_dir: str | os.PathLike,
    results: Mapping[str, Any],
    *,
    history: Sequence[Mapping[str, Any]] = (),
    items: Mapping[str, Mapping[str, Sequence[Mapping]]] | None = None,
    cases: Sequence[Mapping[str, Any]] | None = None,
    title: str = "Unlearning report",
    seconds: float | None = None,
    num_cases: int = NUM_CASES,
    seed: int = 0,
) -> Path:
    """Writes what a run did so that a person can judge it.

    Each file appears whole or not at all, and `results.json` last: where it stands, the report beside it is complete.

    Args:
        output_dir: The run's folder; made where it is missing.
        results: {"before", "after", "oracle"}, any of which may be absent: dicts in the layout of `eval.schema`, or
            objects with a `to_dict()`.
        history: `trainer.state.log_history`: dicts with "step" and keys "loss/...", "kl/...", "probe/TASK/METRIC", and
            those of bias probes (docs/schemas.md).
        items: {"before": {task: records}, "after": {task: records}}, for item-by-item changes.
        cases: Candidates for case studies: dicts with "prompt", "expected", "before", "after", and where known "task",
            "kind", "bias_type", "id", "biased", "oracle", "images" (PIL or paths) and "regression" (larger is worse).
        title: The report's heading.
        seconds: Duration of the run.
        num_cases: How many cases to show.
        seed: Seed of the choice of cases.

    Returns:
        The path of `report.md`.

    Raises:
        ValueError: `items` before and after are not of the same items.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    results = {name: _plain(result) for name, result in results.items() if result is not None}
    shown = select_cases(cases or [], num_cases=num_cases, seed=seed)
    paired = _paired_changes(items)
    shown = _write_cases(folder, shown)
    _write_figure(folder / FIGURE_FILE, results, history, title)
    text = report_markdown(results, title=title, history=history, paired=paired, cases=shown, seconds=seconds)
    write_text(folder / REPORT_FILE, text)
    write_text(folder / RESULTS_FILE, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return folder / REPORT_FILE


def report_markdown(
    results: Mapping[str, Any],
    *,
    title: str,
    history: Sequence[Mapping[str, Any]] = (),
    paired: Mapping[str, Sequence[Mapping]] | None = None,
    cases: Sequence[Mapping[str, Any]] = (),
    seconds: float | None = None,
) -> str:
    """The text of report.md: verdicts first, then the figure, the tables and the cases."""
    parts = [
        f"# {' '.join(title.split())}",
        "\n".join(f"- {sentence}" for sentence in verdicts(results)),
        f"![Results]({FIGURE_FILE})",
    ]
    for task in tasks_of(results):
        parts += [f"## {task}", markdown_table(results, task)]
        if groups_of(results, task):
            parts += [f"### {task} by group", groups_table(results, task)]
    parts += _gap_parts(generalisation_gaps(results))
    parts.append("Brackets hold 95% intervals.\n" + "".join(f"\n- {note}" for note in notes(results)))
    course = course_markdown(read_course(history))
    if course:
        parts += ["## Probes and swaps", course]
    if paired:
        parts.append("## Item by item")
        parts.append("Change of each item's own value, after minus before, with a paired 95% interval.")
        for task, rows in paired.items():
            parts += [f"### {task}, item by item", paired_table(rows[:MAX_PAIRED_ROWS])]
            if len(rows) > MAX_PAIRED_ROWS:
                parts.append(f"{len(rows) - MAX_PAIRED_ROWS} more rows are left out.")
    if cases:
        parts += ["## Cases", "The worst regressions first, then cases drawn with a fixed seed.", cases_markdown(cases)]
    models = ", ".join(f"{state}: `{result['model']}`" for state, result in results.items() if result.get("model"))
    took = f"The run took {seconds:.0f} s. " if seconds is not None else ""
    parts.append(f"{took}{models + '. ' if models else ''}All numbers: [{RESULTS_FILE}]({RESULTS_FILE}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def _gap_parts(gaps: Sequence[Gap]) -> list[str]:
    """The tables of trained beside unseen rows, one a metric."""
    if not gaps:
        return []
    parts = [
        "## Seen and unseen",
        "Trained rows (train) beside rows that training never saw (report), before -> after. The gap is the change on "
        "seen rows minus the change on unseen ones: near 0, what was unlearned carries over to new rows. Its interval "
        "joins all four as if they were independent, and is rather too wide than too narrow.",
    ]
    for name, metric in dict.fromkeys((gap.name, gap.metric) for gap in gaps):
        table = gap_table([gap for gap in gaps if (gap.name, gap.metric) == (name, metric)])
        parts += [f"### {name}: `{metric}`, seen and unseen", table]
    return parts


def _paired_changes(items: Mapping[str, Mapping] | None) -> dict[str, list[dict]]:
    if not items or "before" not in items or "after" not in items:
        return {}
    tasks = [task for task in items["before"] if task in items["after"]]
    changes = {task: compare(items["before"][task], items["after"][task], name=task) for task in tasks}
    return {task: rows for task, rows in changes.items() if rows}


def _write_cases(folder: Path, cases: list[dict]) -> list[dict]:
    """Saves the pictures into a new folder that then takes the old one's place."""
    target = folder / CASES_FOLDER
    made = Path(tempfile.mkdtemp(prefix=".cases-", dir=folder))
    try:
        saved = save_pictures(cases, made)
        if target.is_dir():
            shutil.rmtree(target)
        if any(case["pictures"] for case in saved):
            made.chmod(0o755)
            os.replace(made, target)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return saved


def _write_figure(path: Path, results: Mapping[str, Any], history: Sequence[Mapping], title: str) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        draw_report(partial, results, history=history, title=title)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Turns results into what JSON holds; a metric whose numbers are not finite was not measured, and is left out."""
    if hasattr(value, "to_dict"):
        value = value.to_dict()
    if isinstance(value, Mapping):
        entries = {str(key): _plain(entry) for key, entry in value.items()}
        unmeasured = [key for key, entry in entries.items() if isinstance(entry, dict) and not _is_measured(entry)]
        for key in unmeasured:
            logger.warning("%s has no finite value or interval; it is left out of the report.", key)
        return {key: entry for key, entry in entries.items() if key not in unmeasured}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value.item() if hasattr(value, "item") else value


def _is_measured(entry: Mapping[str, Any]) -> bool:
    numbers = [entry["value"], *(entry.get("ci95") or ())] if "value" in entry else []
    return all(number is not None and math.isfinite(number) for number in numbers)
