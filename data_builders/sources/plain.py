"""A user's own set, in the schema's columns, from any usual place: no builder is needed.

    load_rows("forget.jsonl")            {"prompt": "Who was late?", "completion": " Ann.", "images": "pics/1.png"}
    load_rows("forget.csv")              images: one path, or a JSON list of paths
    load_rows("forget.parquet")          images: paths, or pictures stored in the file
    load_rows("my_set")                  a folder from `save_to_disk`, or of Parquet or JSON Lines files
    load_rows("owner/my_set")            a set of the Hugging Face Hub

The result is a `datasets.Dataset`; its `images`, where there are any, are decoded when a row is read.
"""

import os
from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk

from biasunlearn_trainer.data_builders.images import nearest_files
from biasunlearn_trainer.data_builders.rows import check_brought_pictures, records_to_dataset, with_image_list
from biasunlearn_trainer.data_builders.schema import Faults, check_dataset
from biasunlearn_trainer.data_builders.sources.records import READERS, data_suffix, read_records

SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")


def load_rows(
    path_or_hub_id: str | os.PathLike,
    split: str = "train",
    *,
    config: str | None = None,
    check_images: bool = True,
    allow_outside: bool = False,
) -> Dataset:
    """Loads and checks a set with `prompt`, `completion` and, for pictures, `images` (or `image`).

    Args:
        path_or_hub_id: A .jsonl, .json, .csv, .tsv (each also .gz) or .parquet file, a folder, or the id of a Hub set.
        split: Which split of a folder or a Hub set; a single file is one split, and its name is not asked for.
        config: Configuration of a Hub set that has several.
        check_images: Decode every picture once now, so that no broken one stops a training run later.
        allow_outside: Let relative image paths leave the file's folder by "..", and rows of a Hub set name files here.

    Returns:
        The rows. `images` is a `List(Image())` with an empty list in text rows; absent where no row has a picture.

    Raises:
        FileNotFoundError: Nothing is there; the nearest names are given.
        ConnectionError: The name is no local path, and the Hub cannot be reached.
        InvalidDataset: Faults in the rows, all together, each with its row.
        ValueError: A format or a split that does not exist.
    """
    path = Path(path_or_hub_id).expanduser()
    if path.is_file() and data_suffix(path) in READERS:
        return _load_records(path, check_images, allow_outside)
    if path.is_file() and path.suffix.lower() == ".parquet":
        dataset, folder = load_dataset("parquet", data_files={split: str(path)}, split=split), path.parent
    elif path.is_file():
        raise ValueError(f"{path} has no known format; expected {', '.join(READERS)} or .parquet.")
    elif path.is_dir():
        file = _file_of_split(path, split)
        if file:
            return _load_records(file, check_images, allow_outside)
        dataset, folder = _load_folder(path, split), path
    else:
        dataset, folder = _load_from_hub(str(path_or_hub_id), split, config), None
    faults = Faults(str(path_or_hub_id))
    if folder is None and not allow_outside:
        check_brought_pictures(dataset, faults)
        faults.raise_if_any()
    dataset = with_image_list(dataset, faults, folder, allow_outside)
    check_dataset(dataset, faults, check_images=check_images)
    faults.raise_if_any()
    return dataset


def _load_records(path: Path, check_images: bool, allow_outside: bool) -> Dataset:
    faults = Faults(str(path))
    records = read_records(path, faults)
    return records_to_dataset(records, faults, path.parent, check_images, allow_outside)


def _is_saved(folder: Path) -> bool:
    return any((folder / name).exists() for name in SAVED_DATASET_FILES)


def _file_of_split(folder: Path, split: str) -> Path | None:
    """The JSON or CSV file of a folder that holds the split: `train.jsonl`, or the only data file there."""
    if _is_saved(folder) or any(folder.rglob("*.parquet")):
        return None
    files = sorted(file for file in folder.iterdir() if file.is_file() and data_suffix(file) in READERS)
    named = [file for file in files if file.name.split(".")[0] == split]
    if len(named) == 1 or len(files) == 1:
        return (named or files)[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder} has no one file for split {split!r}; files there: {names}. Name the file itself.")
    return None


def _load_folder(folder: Path, split: str) -> Dataset:
    if _is_saved(folder):
        loaded = load_from_disk(str(folder))
        if isinstance(loaded, Dataset):
            return loaded
    elif any(folder.rglob("*.parquet")):
        loaded = load_dataset(str(folder))
    else:
        names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
        raise ValueError(
            f"{folder} holds no data: expected Parquet, JSON Lines, CSV or a saved dataset; found: {names}."
        )
    if split not in loaded:
        raise ValueError(f"{folder} has no split {split!r}; splits there: {', '.join(loaded)}.")
    return loaded[split]


def _load_from_hub(name: str, split: str, config: str | None) -> Dataset:
    path = Path(name).expanduser()
    near = nearest_files(path)
    hint = f" (nearest there: {', '.join(near)})" if near else ""
    if not path.parent.is_dir():
        hint = f" (its folder {str(path.parent)!r} does not exist)"
    missing = f"No file or folder {name!r}{hint}"
    # A Hub id is `name` or `owner/name`, without a data file's suffix.
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name
    if is_path or data_suffix(path) in (*READERS, ".parquet"):
        raise FileNotFoundError(f"{missing}.")
    try:
        return load_dataset(name, config, split=split)
    except ConnectionError as err:
        raise ConnectionError(
            f"{missing}, and as a Hub set it is neither in the local cache nor can the Hub be reached ({err}). "
            "Correct the path, or download the set where there is a network."
        ) from err
    except FileNotFoundError as err:
        raise FileNotFoundError(f"{missing}, and no such set on the Hub: {err}") from err
