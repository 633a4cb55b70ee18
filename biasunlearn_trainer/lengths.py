"""How long rows are, without making tensors of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

from biasunlearn_trainer.rows import Rows, has_column, image_counts, pieces

LENGTH_COLUMN = "length"
# LLaVA-1.5's 576 tokens at four characters each. It counts where rows have different numbers of pictures.
CHARACTERS_PER_IMAGE = 2304


def row_lengths(rows: Rows, column: str | None = LENGTH_COLUMN) -> np.ndarray:
    """(n,) the rows' lengths: the column's values where there is such a column, else about as many as characters.

    A row counts by the text of its prompt and completion, plain or chat, and `CHARACTERS_PER_IMAGE` for each picture.
    A memory-mapped set is gone through piece by piece, and its pictures are not decoded.

    Args:
        rows: the set.
        column: of lengths, in any unit; None counts characters in any case.

    Raises:
        ValueError: where the column holds something that is no length.

    Example:
        >>> row_lengths([{"prompt": "Why?", "completion": " So."}, {"prompt": "", "completion": "x"}]).tolist()
        [8, 1]
    """
    if column is not None and has_column(rows, column):
        values = _column(rows, column) if isinstance(rows, Dataset) else [pa.array([row[column] for row in rows])]
        return np.concatenate([_checked(part, column) for part in values])
    lengths = image_counts(rows) * CHARACTERS_PER_IMAGE
    for name in ("prompt", "completion"):
        if isinstance(rows, Dataset):
            lengths += np.concatenate([_characters(part) for part in _column(rows, name)])
        else:
            lengths += np.fromiter((_text_length(row[name]) for row in rows), np.int32, len(rows))
    return lengths


def _column(rows: Dataset, column: str) -> Iterator[pa.ChunkedArray]:
    return (piece.column(column) for piece in pieces(rows, [column]))


def _characters(texts: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_string(texts.type) or pa.types.is_large_string(texts.type):
        return pc.fill_null(pc.utf8_length(texts), 0).to_numpy().astype(np.int32)
    return np.array([_text_length(messages) for messages in texts.to_pylist()], dtype=np.int32)


def _text_length(text: str | Sequence[Mapping[str, Any]] | None) -> int:
    if text is None or isinstance(text, str):
        return len(text or "")
    return sum(_content_length(message["content"]) for message in text)


def _content_length(content: str | Sequence[Mapping[str, Any]] | None) -> int:
    """Characters of a message, one text or parts of which some are texts."""
    if content is None or isinstance(content, str):
        return len(content or "")
    return sum(len(part.get("text") or "") for part in content)


def _checked(values: pa.Array | pa.ChunkedArray, column: str) -> np.ndarray:
    is_number = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    found = values.to_numpy() if isinstance(values, pa.ChunkedArray) else values.to_numpy(zero_copy_only=False)
    if not is_number or values.null_count or not (np.isfinite(found) & (found >= 0)).all():
        raise ValueError(
            f"The column {column!r} is to hold each row's length, a number from 0 up; it holds {values.type}, "
            f"{values.null_count} of {len(values)} rows have none. Mend it, or name another in `length_column_name`."
        )
    return found.astype(np.float32)
