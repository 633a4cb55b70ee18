"""Reads JSON Lines, JSON and CSV into plain rows that know their place in the file."""

import contextlib
import csv
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from biasunlearn_trainer.data_builders.schema import COLUMNS, REQUIRED_COLUMNS, Faults, Record

OPTIONAL_CELLS = (*(name for name in COLUMNS if name not in REQUIRED_COLUMNS), "image")


def read_records(path: Path, faults: Faults) -> list[Record]:
    """Reads a data file.

    Args:
        path: A .jsonl, .json, .csv or .tsv file in UTF-8, gzipped if it ends in .gz.
        faults: Where unreadable rows are noted; they are left out of the result.

    Returns:
        Pairs of a place ("line 3", "row 3") and a row. Empty CSV cells are None, except those of required columns.
    """
    reader = READERS[data_suffix(path)]
    records = []
    with opened(path, faults) as file:
        for where, row in reader(file, faults):
            if isinstance(row, dict):
                records.append((where, row))
            else:
                faults.add(f"expected an object with named columns, got {type(row).__name__} {row!r:.60}", where)
    return records


@contextlib.contextmanager
def opened(path: Path, faults: Faults) -> Iterator[TextIO]:
    """Opens a data file; what shows while it is read, of its encoding or packing, is noted and ends the reading."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        # utf-8-sig: spreadsheet programs put a byte order mark before the first column's name.
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            yield file
    except UnicodeDecodeError as err:
        if _is_gzip(path) and path.suffix != ".gz":
            faults.add(f"the file is packed by gzip; name it {path.name}.gz")
        else:
            faults.add(f"the file is not UTF-8 ({err}); save it as UTF-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as err:
        faults.add(f"the file is not a whole gzip file ({err})")


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"


def data_suffix(path: Path) -> str:
    """Returns the suffix that tells the format, without a final .gz: `a.jsonl.gz` -> ".jsonl"."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def _read_jsonl(file: TextIO, faults: Faults) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except json.JSONDecodeError as err:
                faults.add(f"not JSON: {err}", f"line {number}")


def _read_json(file: TextIO, faults: Faults) -> Iterator[tuple[str, Any]]:
    """A list of rows; an object with one list of rows in it ({"data": [...]}); or JSON Lines in spite of the name."""
    text = file.read()
    try:
        content = json.loads(text)
    except json.JSONDecodeError as err:
        lines = text.splitlines(keepends=True)
        if len(lines) > 1 and lines[0].strip().startswith("{") and lines[0].strip().endswith("}"):
            yield from _read_jsonl(lines, faults)
        else:
            faults.add(f"not JSON: {err}")
        return
    if isinstance(content, dict):
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        faults.add(f"expected a list of rows, got {type(content).__name__}")
        return
    yield from ((f"row {number}", row) for number, row in enumerate(content, start=1))


def _read_csv(file: TextIO, faults: Faults, delimiter: str = ",") -> Iterator[tuple[str, Any]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    number = 0
    try:
        names = [name.strip() for name in next(reader, [])]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            faults.add(f"columns named twice: {', '.join(repeated)}")
            return
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(names):
                faults.add(f"{len(cells)} cells, but the header names {len(names)} columns", f"row {number}")
                continue
            row = dict(zip(names, cells, strict=True))
            yield f"row {number}", {name: _cell(name, value, f"row {number}", faults) for name, value in row.items()}
    except csv.Error as err:
        faults.add(f"not CSV after row {number}: {err}")


def _cell(name: str, value: str, where: str, faults: Faults) -> Any:
    if name in ("images", "image") and value.strip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as err:
            faults.add(f"`{name}` begins like a JSON list but is none: {err}", where)
            return None
    return None if value == "" and name in OPTIONAL_CELLS else value


READERS: dict[str, Callable[..., Iterator[tuple[str, Any]]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": lambda file, faults: _read_csv(file, faults, delimiter="\t"),
}
