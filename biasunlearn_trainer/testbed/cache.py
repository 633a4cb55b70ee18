"""Built testbeds on disk: complete or not there at all, whoever builds and however often it is interrupted."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

logger = logging.getLogger(__name__)

MANIFEST = "testbed.json"


def build_once(folder: Path, fill: Callable[[Path], None]) -> Path:
    """Build a folder unless it is there.

    It is built beside its place and renamed when complete. A second process that wants the same folder waits for the
    first; what a killed process left is removed by the next.

    Args:
        folder: where the result belongs.
        fill: writes everything, the manifest last, into the folder it is given.
    """
    if (folder / MANIFEST).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / MANIFEST).is_file():
            return folder
        partial = folder.with_name(f"{folder.name}.partial")
        for leftover in (partial, folder):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir()
        try:
            fill(partial)
            os.replace(partial, folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    logger.info("Built %s", folder)
    return folder
