"""What a cell's folder holds: a finished run, one to continue, another one's figures, or nothing yet."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from biasunlearn_trainer.checkpoints import last_usable
from biasunlearn_trainer.eval.schema import EvalResult, load_results
from biasunlearn_trainer.recipe.config import TESTBED_PREFIX
from biasunlearn_trainer.run_files import ENVIRONMENT_FILE, RESOLVED_FILE, RESULTS_FILE
from biasunlearn_trainer.tables.plan import Cell

RECIPE_FILE, LOG_FILE, ERROR_FILE, LOCK_FILE = "recipe.yaml", "log.txt", "error.txt", ".lock"
IMMATERIAL = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dry_run",
    "disable_tqdm",
    "push_to_hub",
    "report_to",
    "run_name",
)
IMMATERIAL_PREFIXES = ("save_", "logging_", "log_", "hub_")
"""Keys that change no figure: a finished cell stays finished whatever they are."""
FILLED_BY_TESTBED = ("model_name_or_path", "oracle_model", "tasks")
PLACED_BY_TESTBED = ("tasks", "probes", "bias_probe")


@dataclasses.dataclass(frozen=True)
class Status:
    """What stands in a cell's folder.

    Attributes:
        kind: "finished", "changed" (a run of another recipe), "interrupted" (to be continued) or "missing".
        detail: what changed, or the checkpoint to continue from.
        error: the first line of the error that ended the last attempt, "" where there was none.
        results: the figures of a finished run by state, otherwise None.
    """

    kind: str
    detail: str = ""
    error: str = ""
    results: dict[str, EvalResult] | None = None

    def __str__(self) -> str:
        failed = f"failed: {self.error}; " if self.error else ""
        return f"{failed}{self.kind} ({self.detail})" if self.detail else f"{failed}{self.kind}"


def status_of(cell: Cell) -> Status:
    """Reads what stands in a cell's folder.

    A run of another recipe counts as changed where there is something to lose: results or a usable checkpoint.
    """
    results, checkpoint = _finished_results(cell.folder), last_usable(cell.folder, thorough=False)
    changes = _changes(cell) if results or checkpoint else []
    if changes:
        return Status("changed", "; ".join(changes))
    if results:
        return Status("finished", results=results)
    path = cell.folder / ERROR_FILE
    error = path.read_text(encoding="utf-8").partition("\n")[0] if path.is_file() else ""
    return Status("interrupted", checkpoint.name, error) if checkpoint else Status("missing", error=error)


def _finished_results(folder: Path) -> dict[str, EvalResult] | None:
    try:
        results = load_results(folder / RESULTS_FILE)
    except (OSError, ValueError):
        return None
    return results if isinstance(results, dict) and "after" in results else None


def _changes(cell: Cell) -> list[str]:
    """What the run in the folder had set otherwise than the cell now asks for, a sentence a key."""
    path = cell.folder / RESOLVED_FILE
    if not path.is_file():
        return [f"there are results without {RESOLVED_FILE}, which says of what"]
    had = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    asked = yaml.safe_load(cell.recipe.to_yaml()) or {}
    changes = []
    for key in sorted({*had, *asked}):
        if key in IMMATERIAL or key.startswith(IMMATERIAL_PREFIXES):
            continue
        if "testbed" in asked and key not in asked and (key in FILLED_BY_TESTBED or key.endswith("_dataset")):
            continue
        old, new = had.get(key, _default(cell, key)), asked.get(key, _default(cell, key))
        if str(new).startswith(TESTBED_PREFIX) and Path(str(old)).name == str(new).removeprefix(TESTBED_PREFIX):
            continue  # the run says where the testbed's set of this name lies
        if "testbed" in asked and key in PLACED_BY_TESTBED:
            old, new = _names_of(old), _names_of(new)
        if old != new:
            changes.append(f"`{key}` was {old}, now {new}")
    return changes


def _names_of(specs: Any) -> Any:
    """Task specs without the paths where a testbed placed them."""
    if isinstance(specs, str):
        return specs.partition("=")[0]
    return [_names_of(spec) for spec in specs] if isinstance(specs, list) else specs


def _default(cell: Cell, key: str) -> Any:
    default = cell.recipe.specs[key].default if key in cell.recipe.specs else None
    return getattr(default, "value", default)


def facts_of(folder: Path) -> dict[str, str]:
    """What a run says of its packages, its model and its data, by name; empty where it says nothing."""
    try:
        said = json.loads((folder / ENVIRONMENT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    facts = {f"The version of {name}": str(version) for name, version in said.get("packages", {}).items()}
    parts = {"model": said.get("model", {}), **said.get("data", {})}
    for name, part in parts.items():
        facts[f"The fingerprint of {name} {part.get('source')}"] = str(part.get("fingerprint"))
    return facts


@contextlib.contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[int | None]:
    """Holds a folder's lock.

    The lock belongs to the open file, so that a process to which it is handed on keeps it: a cell whose grid runner
    was killed stays locked until the cell itself ends.

    Args:
        folder: made where it is missing.
        wait: wait for another holder instead of giving up.

    Yields:
        The lock's file descriptor, or None where another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def is_locked(folder: Path) -> bool:
    """Whether a process runs the cell now; writes nothing."""
    if not (folder / LOCK_FILE).is_file():
        return False
    with locked(folder) as lock:
        return lock is None
