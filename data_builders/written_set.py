"""Writes rows as Parquet, a batch at a time, with their pictures inside, so that the folder needs nothing else."""

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, List, Value

from biasunlearn_trainer.data_builders.images import content_digest, image_bytes

BATCH_SIZE = 512
FIRST_COLUMNS = ("prompt", "completion", "images", "bias_type", "polarity", "pair_id", "source", "source_id")


class RowSpool:
    """Rows on disk between two passes over them, one JSON line each; a temporary file of one build."""

    def __init__(self, path: Path):
        self.path, self.num_rows = path, 0
        self.schema: pa.Schema | None = None
        path.parent.mkdir(parents=True, exist_ok=True)

    def write(self, rows: Iterable[dict]) -> None:
        """Writes rows and learns which columns of which types they have.

        Raises:
            ValueError: two rows have a column in types that do not go together; both are shown.
        """
        rows = iter(rows)
        with open(self.path, "w", encoding="utf-8") as file:
            while batch := list(itertools.islice(rows, BATCH_SIZE)):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch)
                self._learn(batch)
                self.num_rows += len(batch)

    def _learn(self, batch: list[dict]) -> None:
        names = dict.fromkeys(name for row in batch for name in row if name != "images")
        schemas = [] if self.schema is None else [self.schema]
        for name in names:
            try:
                kind = pa.array([row.get(name) for row in batch]).type
                schemas.append(pa.schema([(name, kind)]))
                self.schema = pa.unify_schemas(schemas, promote_options="permissive")
            except (pa.ArrowInvalid, pa.ArrowTypeError) as err:
                raise ValueError(f"the rows mix types of values in column `{name}`: {err}") from err
            schemas = [self.schema]

    def __iter__(self) -> Iterator[dict]:
        """Reads the rows."""
        with open(self.path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    def chosen(self, wanted: Iterable[bool]) -> Iterator[dict]:
        """Reads the rows for which `wanted`, which has a value a row, is true."""
        with open(self.path, encoding="utf-8") as file:
            for line in itertools.compress(file, wanted):
                yield json.loads(line)

    def remove(self) -> None:
        """Removes the file."""
        self.path.unlink(missing_ok=True)


def features_of(schema: pa.Schema, has_images: bool) -> Features:
    """The features of the written set: every split has all columns, so that the Hub shows them as one set."""
    given = {field.name: field.type for field in schema}
    names = [name for name in FIRST_COLUMNS if name in given or (name == "images" and has_images)]
    names += [name for name in given if name not in names]
    kinds = {}
    for name in names:
        kind = given.get(name)
        if name == "images":
            kinds[name] = List(Image())
        elif pa.types.is_null(kind):
            kinds[name] = Value("string")
        else:
            kinds[name] = Features.from_arrow_schema(pa.schema([(name, kind)]))[name]
    return Features(kinds)


def write_parquet(rows: Iterable[dict], path: Path, features: Features) -> tuple[int, str]:
    """Writes rows to a Parquet file.

    Args:
        rows: with pictures as paths.
        path: the file.
        features: of `features_of`.

    Returns:
        How many rows, and their fingerprint: a digest of texts, labels and pictures, in order.

    Raises:
        OSError: a picture or the disk.
    """
    fingerprint, num_rows = hashlib.blake2b(digest_size=16), 0
    rows = iter(rows)
    schema = features.arrow_schema
    with pq.ParquetWriter(path, schema) as writer:
        while batch := list(itertools.islice(rows, BATCH_SIZE)):
            columns: dict[str, list[Any]] = {name: [row.get(name) for row in batch] for name in features}
            if "images" in features:
                columns["images"] = [_stored(images or []) for images in columns["images"]]
            for number, row in enumerate(batch):
                pictures = [
                    content_digest(image["bytes"]).hex() for image in columns.get("images", {number: []})[number]
                ]
                known = {name: row.get(name) for name in features if name != "images"}
                fingerprint.update(json.dumps([known, pictures], sort_keys=True, ensure_ascii=False).encode())
            writer.write_table(pa.table(columns, schema=schema))
            num_rows += len(batch)
    return num_rows, fingerprint.hexdigest()


def _stored(images: list) -> list[dict[str, Any]]:
    """Pictures as `datasets` stores them: bytes, and a name without the folders of this machine."""
    return [{"bytes": image_bytes(image), "path": _name(image)} for image in images]


def _name(image: Any) -> str:
    path = image.get("path") if isinstance(image, dict) else image
    return os.path.basename(path or "image.png")
