"""Rows as Parquet files with their pictures inside, which `datasets.load_dataset` reads back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, List, Value
from transformers.utils import logging as transformers_logging

ROWS_FILE = "rows.parquet"


def write_rows(rows: Sequence[dict[str, Any]], folder: Path) -> int:
    """Write rows of one schema to `folder/rows.parquet`; pictures are stored as PNG, all else is text or lists of it.

    Returns the number of rows.
    """
    features = Features({name: _feature(name, value) for name, value in rows[0].items()})
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(list(rows), features=features).to_parquet(folder / ROWS_FILE)
    return len(rows)


def _feature(name: str, value: Any) -> Any:
    kind = Image() if name == "images" else Value("string")
    return List(kind) if isinstance(value, list) else kind


@contextmanager
def quiet_writes() -> Iterator[None]:
    """Without the progress bars that `datasets` and `transformers` show for each of these small files."""
    rows_shown = not datasets.are_progress_bars_disabled()
    weights_shown = transformers_logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if rows_shown:
            datasets.enable_progress_bars()
        if weights_shown:
            transformers_logging.enable_progress_bar()
