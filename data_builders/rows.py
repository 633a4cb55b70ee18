"""Turns rows into a `datasets.Dataset` whose pictures are decoded when a row is read."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pyarrow as pa
from datasets import Dataset, Features, Image, LargeList, List, Value
from datasets.features.features import generate_from_arrow_type
from huggingface_hub.constants import HF_HUB_CACHE

from biasunlearn_trainer.data_builders.images import resolve_path, undecoded
from biasunlearn_trainer.data_builders.schema import REQUIRED_COLUMNS, Faults, Record, check_columns, check_rows

ID_COLUMNS = ("bias_type", "polarity", "pair_id", "source", "source_id")


def rows_to_dataset(
    rows: Iterable[dict],
    name: str = "rows",
    *,
    folder: str | os.PathLike | None = None,
    check_images: bool = True,
    allow_outside: bool = False,
) -> Dataset:
    """Builds a checked set from rows in memory.

    Args:
        rows: Rows in the schema's columns; `images` are paths or PIL images, one or a list.
        name: What errors call the set.
        folder: Where relative image paths start; None allows absolute ones only.
        check_images: Decode every picture once now.
        allow_outside: Let relative image paths leave `folder` by "..".

    Raises:
        InvalidDataset: Faults in the rows, all together.

    >>> rows_to_dataset([{"prompt": "2 + 2 =", "completion": " 4"}])[0]
    {'prompt': '2 + 2 =', 'completion': ' 4'}
    """
    records = [(f"row {number}", dict(row)) for number, row in enumerate(rows, start=1)]
    return records_to_dataset(records, Faults(name), Path(folder) if folder else None, check_images, allow_outside)


def records_to_dataset(
    records: list[Record], faults: Faults, folder: Path | None, check_images: bool, allow_outside: bool
) -> Dataset:
    """Builds a checked set from rows that know their place in a file; the reader may have noted faults already."""
    columns = list(dict.fromkeys(name for _, row in records for name in row))
    if records:
        check_columns(["images" if name == "image" else name for name in columns], faults)
    for _, row in records:
        row.update({name: row.get(name) for name in REQUIRED_COLUMNS if name in columns})
    rows = [(where, _with_resolved_images(where, row, faults, folder, allow_outside)) for where, row in records]
    if rows or not faults.count:
        check_rows(rows, faults, check_images=check_images)
    faults.raise_if_any()
    return _build([row for _, row in rows], columns, faults)


def _with_resolved_images(where: str, row: dict, faults: Faults, folder: Path | None, allow_outside: bool) -> dict:
    """The row with `images` as a list: of absolute paths, and of pictures where it holds pictures."""
    if "image" in row and "images" in row:
        faults.add("has both `image` and `images`; keep one", where)
    images = row.pop("images", None) or row.pop("image", None)
    row.pop("image", None)
    if images is None or (isinstance(images, str | list | tuple) and not images):
        return row
    resolved = []
    for image in images if isinstance(images, list | tuple) else [images]:
        try:
            resolved.append(_resolved(image, folder, allow_outside))
        except ValueError as err:
            faults.add(str(err), where)
    row["images"] = resolved
    return row


def _resolved(image: Any, folder: Path | None, allow_outside: bool) -> Any:
    if isinstance(image, PIL.Image.Image):
        return image
    if not isinstance(image, str | os.PathLike):
        raise ValueError(f"`images` holds {image!r:.60}; expected a path or a list of paths")
    return resolve_path(os.fspath(image), folder, allow_outside)


def _build(rows: list[dict], columns: list[str], faults: Faults) -> Dataset:
    """Turns checked rows into a set; a column that mixes types is a fault."""
    values, features = {}, {}
    for name in columns:
        if name in ("images", "image"):
            continue
        values[name] = [row.get(name) for row in rows]
        if name in ID_COLUMNS:
            values[name] = [None if value is None else str(value) for value in values[name]]
        if name in ("prompt", "completion"):
            values[name] = _even_contents(values[name])
        try:
            features[name] = Value("string") if name in ID_COLUMNS else _feature(values[name])
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as err:
            faults.add(f"column `{name}` mixes types of values: {err}")
    faults.raise_if_any()
    if any(row.get("images") for row in rows):
        values["images"] = [row.get("images") or [] for row in rows]
        features["images"] = List(Image())
    return Dataset.from_dict(values, features=Features(features))


def _feature(values: list) -> Any:
    return generate_from_arrow_type(pa.array(values).type)


def _even_contents(values: list) -> list:
    """Writes all message contents as lists of parts if one of them is: a column of Arrow holds one form."""
    messages = [message for value in values if isinstance(value, list) for message in value]
    if not any(isinstance(message["content"], list) for message in messages):
        return values
    for message in messages:
        if isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
    return values


def with_image_list(dataset: Dataset, faults: Faults, folder: Path | None, allow_outside: bool) -> Dataset:
    """Gives `images` its one feature, `List(Image())`, from pictures, lists of pictures, paths or lists of paths.

    Args:
        dataset: A set as loaded; a column `image` is taken for `images`.
        faults: Where paths that do not resolve are noted.
        folder: Where relative paths start.
        allow_outside: Let them leave it.

    Returns:
        The set; without `images` where no row has a picture.
    """
    if "image" in dataset.column_names:
        if "images" in dataset.column_names:
            faults.add("has both a column `image` and a column `images`; keep one")
            return dataset.remove_columns(["image", "images"])
        dataset = dataset.rename_column("image", "images")
    feature = dataset.features.get("images")
    if feature is None:
        return dataset
    if isinstance(feature, Image):
        plain = dataset.cast_column("images", Image(decode=False))
        dataset = plain.map(_listed, batched=True, features=Features({**dataset.features, "images": List(Image())}))
    element = feature.feature if isinstance(feature, List | LargeList) else feature
    if isinstance(feature, List | LargeList) and _holds_pictures(element):
        if feature != List(Image()):
            dataset = dataset.cast_column("images", List(Image()))
    elif getattr(element, "dtype", None) in ("string", "large_string", "null"):
        dataset = _with_pictures_of_paths(dataset, faults, folder, allow_outside)
    elif not isinstance(feature, Image):
        faults.add(f"`images` must hold paths or pictures, got {feature}")
        return dataset.remove_columns("images")
    has_pictures = any(row["images"] for row in undecoded(dataset.select_columns("images")))
    return dataset if has_pictures else dataset.remove_columns("images")


def check_brought_pictures(dataset: Dataset, faults: Faults) -> None:
    """Notes pictures that a set from the Hub does not bring: rows by others must name no file of this machine, no URL.

    Args:
        dataset: as loaded, with `images` or `image`.
        faults: where the rows are noted.
    """
    caches = [Path(folder).resolve() for folder in (datasets.config.HF_CACHE_HOME, HF_HUB_CACHE)]
    columns = [name for name in ("images", "image") if name in dataset.column_names]
    for number, row in enumerate(undecoded(dataset.select_columns(columns)) if columns else (), start=1):
        for value in row.values():
            for image in value if isinstance(value, list) else [value]:
                path = image.get("path") if isinstance(image, dict) else image
                has_bytes = isinstance(image, dict) and image.get("bytes") is not None
                if has_bytes or not isinstance(path, str):
                    continue
                if not any(Path(path).resolve().is_relative_to(folder) for folder in caches):
                    faults.add(
                        f"names the file {path!r} in place of a picture, which a set from the Hub may not; download "
                        "the set and its pictures, and name the folder",
                        f"row {number}",
                    )


def _holds_pictures(element: Any) -> bool:
    """Pictures as `datasets` stores them; without its metadata (a file from pandas) they are structs or bytes."""
    if isinstance(element, dict):
        return set(element) == {"bytes", "path"}
    return isinstance(element, Image) or getattr(element, "dtype", None) in ("binary", "large_binary")


def _with_pictures_of_paths(dataset: Dataset, faults: Faults, folder: Path | None, allow_outside: bool) -> Dataset:
    rows = ({"images": value} for value in dataset["images"])
    resolved = [
        _with_resolved_images(f"row {number}", row, faults, folder, allow_outside).get("images", [])
        for number, row in enumerate(rows, start=1)
    ]
    stored = [[{"path": path, "bytes": None} for path in paths] for paths in resolved]
    return dataset.remove_columns("images").add_column("images", stored, feature=List(Image()))


def _listed(batch: dict) -> dict:
    return {"images": [[] if image is None else [image] for image in batch["images"]]}
