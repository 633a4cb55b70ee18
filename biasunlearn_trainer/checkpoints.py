"""Checkpoints that are whole or not there at all.

A checkpoint is written into `unfinished/`, beside the others but not among them. When every process is done, a list
of its files with their sizes and digests is added, everything is flushed to the disk, and the folder is renamed to
`checkpoint-STEP`: a rename happens or does not. So a run that is killed while it writes keeps the checkpoint before,
and a file that a disk lost or cut off later does not agree with the list.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SEAL_FILE = "complete.json"
"""The list of a checkpoint's files; the last that is written."""
UNFINISHED = "unfinished"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a full disk, a full quota, a file above the limit of the file system or the user."""
PREFIX = "checkpoint-"
AT_ONCE = 1 << 22
HASHING_THREADS = 4
FAULTS_SHOWN = 5


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or cannot be continued from."""


def step_of(folder: Path) -> int:
    """The step in a checkpoint's name; -1 where it has none."""
    number = folder.name.removeprefix(PREFIX)
    return int(number) if folder.name.startswith(PREFIX) and number.isdecimal() else -1


def checkpoints_in(output_dir: str | os.PathLike) -> list[Path]:
    """Folders of the name `checkpoint-STEP`, whole or broken, by step."""
    found = [folder for folder in Path(output_dir).glob(f"{PREFIX}*") if folder.is_dir() and step_of(folder) >= 0]
    return sorted(found, key=step_of)


def complete(folder: Path, target: Path, run: Mapping[str, Any]) -> None:
    """Seals what lies in `folder`, flushes it to the disk and renames it.

    Args:
        folder: written to its end by every process; on the same file system as `target`.
        target: `checkpoint-STEP`; a folder that lies there is replaced.
        run: what wrote it, for a later `resume_from_checkpoint`.
    """
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        digests = list(threads.map(lambda name: _digest(folder / name), names))
    files = {n: {"bytes": (folder / n).stat().st_size, "sha256": d} for n, d in zip(names, digests, strict=True)}
    seal = {"step": step_of(target), "run": dict(run), "files": files}
    (folder / SEAL_FILE).write_text(json.dumps(seal, indent=1) + "\n", encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        _flush(path)
    replaced = folder.with_name(f"replaced-{target.name}")
    if target.exists():
        os.rename(target, replaced)
    os.rename(folder, target)
    _flush(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def read_seal(folder: str | os.PathLike) -> dict[str, Any]:
    """What `complete` wrote.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    path = Path(folder) / SEAL_FILE
    if not path.is_file():
        raise CheckpointError(f"it has no {SEAL_FILE}: it was broken off, or another program wrote it")
    try:
        seal = json.loads(path.read_text(encoding="utf-8"))
        return {"step": seal["step"], "run": dict(seal["run"]), "files": dict(seal["files"])}
    except (ValueError, TypeError, KeyError) as err:
        raise CheckpointError(f"its {SEAL_FILE} cannot be read ({err!r})") from err


def faults_of(folder: str | os.PathLike, thorough: bool = True) -> list[str]:
    """What is wrong with a checkpoint's files; nothing where it is as it was written.

    Args:
        folder: the checkpoint.
        thorough: read the files and compare their digests; else compare names and sizes.
    """
    folder = Path(folder)
    try:
        files = read_seal(folder)["files"]
    except CheckpointError as err:
        return [str(err)]
    faults = []
    for name, written in files.items():
        path = folder / name
        if not path.is_file():
            faults.append(f"{name} is missing")
        elif path.stat().st_size != written["bytes"]:
            faults.append(f"{name} has {path.stat().st_size} bytes of {written['bytes']}")
    if thorough and not faults:
        with ThreadPoolExecutor(HASHING_THREADS) as threads:
            digests = threads.map(lambda name: _digest(folder / name), files)
        found = zip(files, digests, strict=True)
        faults = [f"{name} is not what was written" for name, digest in found if digest != files[name]["sha256"]]
    more = [f"and {len(faults) - FAULTS_SHOWN} more"] if len(faults) > FAULTS_SHOWN else []
    return faults[:FAULTS_SHOWN] + more


def last_usable(output_dir: str | os.PathLike, thorough: bool = True) -> Path | None:
    """The newest checkpoint that is as it was written; a message for every newer one that is not.

    Args:
        output_dir: of the run.
        thorough: as for `faults_of`.
    """
    for folder in reversed(checkpoints_in(output_dir)):
        faults = faults_of(folder, thorough)
        if not faults:
            return folder
        logger.warning("%s is skipped: %s.", folder, "; ".join(faults))
    return None


def rotate(output_dir: str | os.PathLike, limit: int | None, newest: Path, best: str | os.PathLike | None) -> None:
    """Deletes the oldest usable checkpoints beyond a limit; broken ones are not counted, and left to be looked at.

    Args:
        output_dir: of the run.
        limit: how many may stay; None or 0 for all.
        newest: the one just written, which stays.
        best: the one with the best weights, which stays.
    """
    if not limit or limit < 0:
        return
    usable = [folder for folder in checkpoints_in(output_dir) if not faults_of(folder, thorough=False)]
    kept = {newest.resolve()} | ({Path(best).resolve()} if best else set())
    spare = [folder for folder in usable if folder.resolve() not in kept]
    for folder in spare[: max(0, len(usable) - limit)]:
        # Out of the way first: deleting takes time, and a kill in between would leave half a checkpoint.
        aside = Path(output_dir) / UNFINISHED / f"deleted-{folder.name}"
        aside.parent.mkdir(exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(folder, aside)
        shutil.rmtree(aside, ignore_errors=True)


def clear_unfinished(output_dir: str | os.PathLike) -> None:
    """Deletes what a killed run left of a checkpoint that it was writing."""
    folder = Path(output_dir) / UNFINISHED
    if folder.is_dir():
        left = ", ".join(sorted(path.name for path in folder.iterdir()))
        if left:
            logger.warning("%s holds what an interrupted run was writing (%s); it is deleted.", folder, left)
        shutil.rmtree(folder, ignore_errors=True)


def _flush(path: Path) -> None:
    """Waits until a file or folder stands on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    state = path.stat()
    return _digest_of(str(path.resolve()), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=1024)
def _digest_of(path: str, size: int, changed: int) -> str:
    """SHA-256 of a file, once for each of its states: a run looks at a checkpoint before it loads a model and after."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(AT_ONCE):
            digest.update(piece)
    return digest.hexdigest()
