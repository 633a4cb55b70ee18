"""Which rows go through a model together, settled before the first does: the same for any number of processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from biasunlearn_trainer.fingerprints import content_fingerprint

Row = Mapping[str, Any]


class Outline(NamedTuple):
    """What batches are formed by.

    Attributes:
        index: the row's place.
        pictured: whether it has pictures.
        length: in characters, or in tokens where the row holds tokens.
        prefix: its pictures and its text, by which rows that begin alike stand side by side; None where not asked for.
    """

    index: int
    pictured: bool
    length: int
    prefix: tuple[str, str] | None


def outlines(rows: Sequence[Row], with_prefixes: bool) -> list[Outline]:
    """The outline of every row, each of which is read once."""
    found = []
    for index, row in enumerate(rows):
        pictures = list(row.get("images") or [])
        if "prompt_ids" in row:
            text, length = "", len(row["prompt_ids"]) + len(row["completion_ids"])
        else:
            text = f"{row['prompt']}{row.get('completion') or ''}"
            length = len(str(row["prompt"])) + len(str(row.get("completion") or ""))
        prefix = (" ".join(map(_picture_key, pictures)), text) if with_prefixes else None
        found.append(Outline(index, bool(pictures), length, prefix))
    return found


def batches_by_length(rows: Iterable[Outline], batch_size: int) -> list[list[int]]:
    """Row numbers by batch, longest rows first: little padding, and memory fails early."""
    ordered = sorted(rows, key=lambda row: (-row.length, row.index))
    return [[row.index for row in batch] for batch in _cut(ordered, batch_size)]


def batches_by_prefix(rows: Iterable[Outline], batch_size: int) -> list[list[int]]:
    """Row numbers by batch, rows side by side that begin alike; the batch with the longest rows first."""
    batches = list(_cut(sorted(rows, key=lambda row: (row.prefix, row.index)), batch_size))
    batches.sort(key=lambda batch: -sum(row.length for row in batch))
    return [[row.index for row in batch] for batch in batches]


def _cut(rows: Sequence[Outline], batch_size: int) -> Iterable[Sequence[Outline]]:
    return (rows[start : start + batch_size] for start in range(0, len(rows), batch_size))


def _picture_key(picture: Any) -> str:
    """Equal for equal pictures: a path, or else a digest; of a file that is open and not decoded, of its bytes."""
    if isinstance(picture, str | os.PathLike):
        return str(picture)
    file = getattr(picture, "fp", None)
    if file is None:
        return content_fingerprint([{"images": [picture]}])
    place = file.tell()
    file.seek(0)
    digest = hashlib.blake2b(file.read(), digest_size=16).hexdigest()
    file.seek(place)
    return digest
