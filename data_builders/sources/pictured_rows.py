"""Rows whose pictures stay where they are stored (memory-mapped Arrow) until one is opened.

Many questions share a portrait, and a set may hold more pictures than fit into memory.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image
from datasets import Dataset

from biasunlearn_trainer.data_builders.images import content_digest, image_bytes, image_fault
from biasunlearn_trainer.data_builders.schema import DECODING_THREADS, Faults


@dataclass(frozen=True, eq=False)
class StoredPicture:
    """A picture in a set, read when it is opened.

    Attributes:
        table: the set, reduced to the picture's column.
        row: its row there.
        place: its place in the row's list of pictures.
    """

    table: Dataset
    row: int
    place: int = 0

    @property
    def stored(self) -> Any:
        """The picture as stored: `{"bytes", "path"}`, or None."""
        value = self.table[self.row].column(0)[0].as_py()
        return value[self.place] if isinstance(value, list) else value

    def open(self) -> PIL.Image.Image:
        """The picture; each call opens it anew, so that no decoded one stays in memory."""
        return PIL.Image.open(io.BytesIO(image_bytes(self.stored)))


class PicturedRows(Sequence):
    """Rows of which some have a picture that is opened when the row is read.

    Args:
        rows: rows without `images`.
        pictures: of each row its picture, or None.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], pictures: Sequence[StoredPicture | None]):
        if len(rows) != len(pictures):
            raise ValueError(f"Got {len(rows)} rows and {len(pictures)} pictures; each row needs one, or None.")
        self._rows, self._pictures = rows, pictures

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self._pictures[index]
        row = dict(self._rows[index])
        return row if picture is None else {**row, "images": [picture.open()]}

    def stored(self) -> Iterable[tuple[dict[str, Any], StoredPicture | None]]:
        """The rows without `images`, each with its picture as stored."""
        return ((dict(row), picture) for row, picture in zip(self._rows, self._pictures, strict=True))

    def take(self, indices: Iterable[int]) -> PicturedRows:
        """The rows at some places."""
        indices = list(indices)
        return PicturedRows([self._rows[i] for i in indices], [self._pictures[i] for i in indices])


def picture_table(dataset: Dataset, column: str) -> Dataset:
    """The set reduced to its pictures, to make `StoredPicture`s of."""
    return dataset.select_columns([column]).with_format("arrow")


def check_pictures(pictures: Mapping[str, StoredPicture], faults: Faults) -> None:
    """Notes the pictures that are missing or do not open, decoding each once.

    Args:
        pictures: by place ("row 3").
        faults: where they are noted.
    """

    def fault(picture: StoredPicture) -> str | None:
        stored = picture.stored
        return "the picture is missing (null)" if stored is None else image_fault(stored)

    with ThreadPoolExecutor(DECODING_THREADS) as pool:
        for where, text in zip(pictures, pool.map(fault, pictures.values()), strict=True):
            if text:
                faults.add(text, where)


def write_jsonl(parts: Iterable[PicturedRows], file: Path) -> int:
    """Writes rows as JSON Lines, and their pictures, each once, into a folder `pictures` beside the file.

    Args:
        parts: rows with the same columns.
        file: a .jsonl file, which `load_rows` reads; pictures are named by a digest of what they hold.

    Returns:
        The number of rows.
    """
    folder, names, lines = file.parent / "pictures", {}, []
    folder.mkdir(parents=True, exist_ok=True)
    for rows in parts:
        for row, picture in rows.stored():
            if picture is not None:
                if picture not in names:
                    names[picture] = _save(picture, folder)
                row = {**row, "images": [f"pictures/{names[picture]}"]}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    file.write_text("".join(lines), encoding="utf-8")
    return len(lines)


def _save(picture: StoredPicture, folder: Path) -> str:
    content = image_bytes(picture.stored)
    with PIL.Image.open(io.BytesIO(content)) as opened:
        name = f"{content_digest(content).hex()}.{(opened.format or 'png').lower()}"
    (folder / name).write_bytes(content)
    return name
