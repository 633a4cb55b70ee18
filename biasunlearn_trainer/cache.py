"""Where things that are built once are kept."""

from __future__ import annotations

import os
from pathlib import Path


def cache_home(cache_dir: str | os.PathLike | None = None) -> Path:
    """The library's cache folder.

    Args:
        cache_dir: the folder to use; None for `BIASUNLEARN_CACHE`, or else `biasunlearn` in the user's own cache folder
            (`XDG_CACHE_HOME`, or `.cache` in the home folder).
    """
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    chosen = cache_dir or os.environ.get("BIASUNLEARN_CACHE") or user_cache / "biasunlearn"
    return Path(chosen).expanduser().resolve()
