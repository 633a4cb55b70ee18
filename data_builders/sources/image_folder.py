"""A folder of pictures with a table that names them, as `datasets` lays out its image folders.

    my_set/metadata.csv      file_name,prompt,completion,bias_type      (or .tsv, .jsonl, .json)
    my_set/pictures/1.png

The table is called `metadata`, or is the only one in the folder. `file_name` (also `image` or `images`) is a path in
the folder; the other columns are the schema's. A table of captions needs no more than a column for the text:

    file_name,text           with completion="text", prompt="Describe the picture."
"""

from collections.abc import Iterator
from pathlib import Path

from biasunlearn_trainer.data_builders.images import undecoded
from biasunlearn_trainer.data_builders.rows import records_to_dataset
from biasunlearn_trainer.data_builders.schema import Faults
from biasunlearn_trainer.data_builders.sources.records import READERS, data_suffix, read_records

TABLE = "metadata"
NAME_COLUMNS = ("file_name", "images", "image")


def image_folder_rows(
    path: str, *, prompt: str | None = None, completion: str = "completion", picture: str | None = None
) -> Iterator[dict]:
    """The rows of a folder of pictures.

    Args:
        path: the folder, or its table.
        prompt: asked of every row of a table without a column `prompt`.
        completion: the column with the texts.
        picture: the column with the pictures' paths; by default `file_name`, `images` or `image`.

    Raises:
        FileNotFoundError: no such folder, or no table in it.
        InvalidDataset: all faults, each with its row: columns that are missing, empty texts, pictures that do not open.
        ValueError: several tables, or a prompt given twice.
    """
    file = _table(Path(path).expanduser())
    faults = Faults(str(file))
    records = read_records(file, faults)
    columns = list(dict.fromkeys(name for _, row in records for name in row))
    named = [name for name in ([picture] if picture else NAME_COLUMNS) if name in columns]
    if records and not named:
        faults.add(f"no column `{picture or 'file_name'}` with the pictures; columns found: {', '.join(columns)}")
    if prompt is not None and "prompt" in columns:
        faults.add("it has a column `prompt`, and a prompt is given for all rows; leave one of them out")
    if completion != "completion" and completion not in columns:
        faults.add(f"no column `{completion}`; columns found: {', '.join(columns) or 'none'}")
    faults.raise_if_any()
    given = []
    for number, (where, row) in enumerate(records, start=1):
        name = row.pop(named[0])
        if not name:
            faults.add(f"`{named[0]}` is empty", where)
        if completion != "completion":
            row["completion"] = row.pop(completion)
        asked = {} if prompt is None else {"prompt": prompt}
        own = {"pair_id": str(number), "source": file.parent.name, "source_id": str(name)}
        given.append((where, {**own, **asked, **row, "images": name}))
    dataset = records_to_dataset(given, faults, file.parent, True, False)
    for row in undecoded(dataset):
        yield {**row, "images": [image["path"] for image in row["images"]]}


def _table(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"There is no folder of pictures at {path}.")
    tables = sorted(file for file in path.iterdir() if file.is_file() and data_suffix(file) in READERS)
    named = [file for file in tables if file.name.split(".")[0] == TABLE]
    if len(named) != 1 and len(tables) != 1:
        there = ", ".join(file.name for file in named or tables) or "none"
        error = ValueError if tables else FileNotFoundError
        raise error(f"{path} needs one table that names its pictures, {TABLE}.csv; tables there: {there}.")
    return (named or tables)[0]
