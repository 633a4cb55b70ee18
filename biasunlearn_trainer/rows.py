"""Sets as they lie on disk: read piece by piece, without decoding pictures that nobody asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image, List

# Rows that are read at once: of a selection they are copied, pictures and all.
READ_AT_ONCE = 256

Rows = Sequence[Mapping[str, Any]]


def has_column(rows: Rows, column: str) -> bool:
    """Whether a set has a column; for a list of rows, whether every row has it."""
    return column in rows.column_names if isinstance(rows, Dataset) else all(column in row for row in rows)


def has_encoded_images(rows: Rows) -> bool:
    """Whether pictures lie in the set encoded, in lists, and rows are given out as they are."""
    feature = rows.features.get("images") if isinstance(rows, Dataset) else None
    return isinstance(feature, List) and isinstance(feature.feature, Image) and rows.format["type"] is None


def pieces(rows: Dataset, columns: Sequence[str]) -> Iterator[pa.Table]:
    """The columns of a set, a few rows at a time; pictures as {bytes, path}."""
    yield from rows.select_columns(list(columns)).with_format("arrow").iter(READ_AT_ONCE)


def image_counts(rows: Rows) -> np.ndarray:
    """(n,) int32 how many pictures each row has; none of them is decoded."""
    if not isinstance(rows, Dataset):
        return np.fromiter((len(row.get("images") or ()) for row in rows), np.int32, len(rows))
    if not has_column(rows, "images"):
        return np.zeros(len(rows), dtype=np.int32)
    return np.concatenate([_list_lengths(piece.column("images")) for piece in pieces(rows, ["images"])])


@dataclass(frozen=True)
class Categories:
    """One of a few words for each row.

    Attributes:
        names: the words that occur, in order of the alphabet; "" for rows that have none.
        codes: (n,) int32 each row's place among them.
    """

    names: list[str]
    codes: np.ndarray

    @classmethod
    def of(cls, words: Iterable[str | None]) -> Categories:
        """The categories of a list of words.

        Example:
            >>> found = Categories.of(["race", None, "age", "race"])
            >>> found.names, found.codes.tolist()
            (['', 'age', 'race'], [2, 0, 1, 2])
        """
        places: dict[str, int] = {}
        codes = np.fromiter((places.setdefault(word or "", len(places)) for word in words), np.int32)
        names = sorted(places)
        rank = np.empty(len(names), np.int32)
        rank[[places[name] for name in names]] = np.arange(len(names))
        return cls(names, rank[codes])

    @classmethod
    def of_column(cls, rows: Rows, column: str) -> Categories:
        """Those that a set's column holds; of a set without it, all "" ."""
        if not isinstance(rows, Dataset):
            return cls.of(row.get(column) for row in rows)
        if not has_column(rows, column):
            return cls([""], np.zeros(len(rows), np.int32))
        return cls.of(word for piece in pieces(rows, [column]) for word in piece.column(column).to_pylist())

    def among(self, names: Sequence[str]) -> np.ndarray:
        """(n,) int32 each row's place among other names, -1 where it is none of them."""
        places = {name: place for place, name in enumerate(names)}
        return np.array([places.get(name, -1) for name in self.names], np.int32)[self.codes]


def id_digests(rows: Rows, column: str) -> np.ndarray | None:
    """(n,) uint64 of each id in a column 64 bits of its digest, or None unless every row has one.

    Texts would take ten times the memory; two of a million ids have one digest in one of 40 million sets.
    """
    if isinstance(rows, Dataset) and not has_column(rows, column):
        return None
    if isinstance(rows, Dataset):
        ids = (key for piece in pieces(rows, [column]) for key in piece.column(column).to_pylist())
    else:
        ids = (row.get(column) for row in rows)
    digests = np.empty(len(rows), np.uint64)
    for number, key in enumerate(ids):
        if key is None:
            return None
        digests[number] = int.from_bytes(hashlib.blake2b(str(key).encode(), digest_size=8).digest(), "little")
    return digests


def _list_lengths(lists: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_null(lists.type):
        return np.zeros(len(lists), dtype=np.int32)
    return pc.fill_null(pc.list_value_length(lists), 0).to_numpy().astype(np.int32)


class RowReader:
    """Rows of a set by number, each picture decoded once.

    `datasets` decodes the first picture of a row twice, to see whether it needs to.

    Args:
        rows: the set.
    """

    def __init__(self, rows: Rows):
        self._encoded = has_encoded_images(rows)
        self._rows = rows.with_format("arrow") if self._encoded else rows

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        if not self._encoded:
            return self._rows[index]
        (row,) = self._rows[index].to_pylist()
        feature = self._rows.features["images"].feature
        if feature.decode and row["images"]:
            row["images"] = [feature.decode_example(image) for image in row["images"]]
        return row
