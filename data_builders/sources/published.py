"""Reads one configuration of a published set, from a copy on disk or from the Hub, under one name: ROOT/CONFIG.

    data/MLLMU-Bench/forget_5         a clone of the Hub repository: a folder of Parquet a configuration
    data/CLEAR/retain95_perturbed     the same; also a folder from `save_to_disk`
    data/tofu/forget10                data/tofu/forget10.json, or .jsonl, .csv, .parquet
    ucf-crcv/SB-Bench/real            OWNER/NAME/CONFIG on the Hub; CONFIG may name a split of the only configuration

Pictures stay where they are stored until one is opened (`pictured_rows`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, Dataset, DatasetDict, load_dataset, load_from_disk

from biasunlearn_trainer.data_builders.images import nearest_files
from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.data_builders.sources.plain import SAVED_DATASET_FILES
from biasunlearn_trainer.data_builders.sources.records import READERS, data_suffix, read_records

SUFFIXES = (*READERS, ".parquet")


def config_name(path: str | os.PathLike) -> str:
    """The configuration that a path names: `data/tofu/forget10.json` -> "forget10"."""
    name = Path(path).name
    return name.split(".")[0] if data_suffix(Path(name)) in SUFFIXES else name


def sibling(path: str | os.PathLike, config: str) -> str:
    """The path of another configuration of the same set, in the same form.

    >>> sibling("data/tofu/forget10.json", "retain_perturbed")
    'data/tofu/retain_perturbed.json'
    """
    text, name = str(path), Path(path).name
    suffix = name[len(config_name(path)) :]
    return text[: len(text.rstrip("/")) - len(name)] + config + suffix


def load_config(path: str | os.PathLike) -> Dataset:
    """Loads a configuration; pictures are not decoded.

    Args:
        path: ROOT/CONFIG as above, or a file.

    Raises:
        FileNotFoundError: nothing is there; what is near is named.
        ConnectionError: it is no local path, and the Hub cannot be reached.
        InvalidDataset: a file with faults, all together.
        ValueError: a path that names no configuration, or one with several splits.
    """
    local = Path(path).expanduser()
    if local.is_file():
        return _load_file(local)
    if local.is_dir():
        return _load_folder(local)
    if local.parent.is_dir():
        return _load_beside(local)
    return _load_from_hub(str(path))


def _load_file(file: Path) -> Dataset:
    if file.suffix.lower() == ".parquet":
        return load_dataset("parquet", data_files=str(file), split="train")
    if data_suffix(file) not in READERS:
        raise ValueError(f"{file} has no known format; expected {', '.join(SUFFIXES)}.")
    faults = Faults(str(file))
    records = read_records(file, faults)
    if not records and not faults.count:
        faults.add("it has no rows")
    faults.raise_if_any()
    return Dataset.from_list([row for _, row in records])


def _load_folder(folder: Path) -> Dataset:
    if any((folder / name).exists() for name in SAVED_DATASET_FILES):
        return _only_split(load_from_disk(str(folder)), str(folder))
    files = sorted(folder.glob("*.parquet"))
    # The Hub's own conversion has a folder for each split: CONFIG/train/0000.parquet.
    parts = [part for part in sorted(folder.iterdir()) if part.is_dir() and any(part.glob("*.parquet"))]
    if not files and len(parts) == 1 and parts[0].name in ("train", "test"):
        files = sorted(parts[0].glob("*.parquet"))
    if not files:
        inside = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
        named = [part.name for part in parts] or inside
        raise FileNotFoundError(
            f"{folder} holds no Parquet file. Name one configuration, {folder}/CONFIG; there: "
            f"{', '.join(named[:30]) or 'nothing'}."
        )
    return load_dataset("parquet", data_files=[str(file) for file in files], split="train")


def _load_beside(path: Path) -> Dataset:
    """A file or the shards of a split under the path's name."""
    for suffix in SUFFIXES:
        if (file := path.with_name(path.name + suffix)).is_file():
            return _load_file(file)
    for folder in (path.parent, path.parent / "data"):
        if shards := sorted(folder.glob(f"{path.name}-*.parquet")):
            return load_dataset("parquet", data_files=[str(shard) for shard in shards], split="train")
    near = ", ".join(nearest_files(path))
    raise FileNotFoundError(
        f"There is no configuration {path.name!r} in {path.parent}" + (f"; nearest: {near}." if near else ".")
    )


def _load_from_hub(path: str) -> Dataset:
    parts = path.split("/")
    if path.startswith((".", "/", "~")) or len(parts) > 3:
        raise FileNotFoundError(f"There is nothing at {path}, and its folder does not exist.")
    if len(parts) < 3:
        raise ValueError(
            f"{path!r} names no configuration. Write OWNER/NAME/CONFIG for the Hub, or a path that exists."
        )
    name, config = "/".join(parts[:2]), parts[2]
    try:
        return _only_split(load_dataset(name, config), path)
    except ConnectionError as err:
        raise ConnectionError(
            f"There is nothing at {path}, and {name} is neither in the local cache of the Hub nor can the Hub be "
            f"reached ({err}). Download the set where there is a network, and give its folder: FOLDER/{config}."
        ) from err
    except FileNotFoundError as err:
        raise FileNotFoundError(f"There is nothing at {path}, and no set {name} on the Hub: {err}") from err
    except ValueError as unknown:
        # `datasets` says so of a name that is no configuration; it may be a split of the only one.
        try:
            return load_dataset(name, split=config)
        except ValueError as err:
            raise ValueError(f"{name} has neither a configuration nor a split {config!r}: {unknown}") from err


def _only_split(loaded: Dataset | DatasetDict, path: str) -> Dataset:
    if isinstance(loaded, Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    for split in ("train", "test"):
        if split in loaded:
            return loaded[split]
    raise ValueError(f"{path} has several splits ({', '.join(loaded)}) and none is called train or test.")


def missing_columns(dataset: Dataset, columns: Sequence[str], faults: Faults) -> bool:
    """Notes which of the columns a set lacks, with those that it has."""
    missing = [column for column in columns if column not in dataset.column_names]
    if missing:
        faults.add(f"columns {', '.join(missing)} are missing; columns found: {', '.join(dataset.column_names)}")
    return bool(missing)


def text_rows(dataset: Dataset, picture_columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows without their pictures, each with its place ("row 3"); labels of a class are written out."""
    columns = [column for column in dataset.column_names if column not in picture_columns]
    labels = {name: f for name, f in dataset.features.items() if isinstance(f, ClassLabel)}
    number = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=256):
        for row in batch.to_pylist():
            number += 1
            for name, feature in labels.items():
                if isinstance(row.get(name), int) and row[name] >= 0:
                    row[name] = feature.int2str(row[name])
            yield f"row {number}", row
