"""VLStereoSet (Zhou, Lai and Jiang, AACL 2022): pictures of StereoSet's target terms, each with three captions.

Read is `data/VLStereoSet.csv` of the authors' repository as published: 1,958 rows, a byte order mark, a column called
"Imaeg URL", and an empty one behind it. `label` says what the picture shows: 0 the stereotype, 1 the anti-stereotype.

The repository states no licence. The sentences are StereoSet's (CC BY-SA 4.0); the pictures are found by an image
search and belong to whoever made them, so that they come from addresses, and sets with them cannot be passed on.
"""

from dataclasses import dataclass
from pathlib import Path

from biasunlearn_trainer.data_builders.schema import Faults, nearest
from biasunlearn_trainer.data_builders.sources.numbered_pictures import FOLDER, find_numbered
from biasunlearn_trainer.data_builders.sources.records import read_records

FILE = "data/VLStereoSet.csv"
URL_COLUMNS = ("Imaeg URL", "Image URL")
COLUMNS = ("bias_type", "target", "context", "stereotype", "anti-stereotype", "unrelated", "label")
BIAS_TYPES = ("gender", "profession", "race", "religion")
SHOWN = {"0": "stereotype", "1": "anti_stereotype"}
LICENCE = "none stated by its authors, and no redistribution of the pictures, which others own"
PROMPT = "Caption for the picture:"


@dataclass(frozen=True)
class VLStereoItem:
    """One picture with its captions.

    Attributes:
        number: the row's number in the file, from 0; the picture's file is named by it.
        bias_type: one of `BIAS_TYPES`.
        target: the term that the captions are about.
        stereotype: the caption that fits the stereotype.
        anti_stereotype: the one that contradicts it.
        unrelated: one that makes no sense.
        shows: which of the first two the picture fits.
        picture: its file.
    """

    number: int
    bias_type: str
    target: str
    stereotype: str
    anti_stereotype: str
    unrelated: str
    shows: str
    picture: Path


def read_vlstereoset(path: str | Path, pictures: str | Path | None = None) -> list[VLStereoItem]:
    """Reads VLStereoSet.

    Args:
        path: the authors' repository, or its CSV file.
        pictures: the folder of the pictures (`numbered_pictures`); by default `images` in the repository, or beside
            the file.

    Returns:
        The rows that have a picture, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        InvalidDataset: all faults of the file, each with its row, or that there are no pictures.
    """
    file = Path(path).expanduser()
    root = file if file.is_dir() else file.parent
    file = root / FILE if file.is_dir() else file
    if not file.is_file():
        raise FileNotFoundError(f"There is no {file}; expected the repository of VLStereoSet, with {FILE}.")
    faults = Faults(str(file))
    records = read_records(file, faults)
    _check_columns(records[0][1] if records else {}, faults)
    faults.raise_if_any()
    for where, row in records:
        for fault in _row_faults(row):
            faults.add(fault, where)
    faults.raise_if_any()
    found = find_numbered(pictures or root / FOLDER, range(len(records)), faults)
    faults.raise_if_any()
    return [_item(number, row, found[number]) for number, (_, row) in enumerate(records) if number in found]


def _check_columns(row: dict, faults: Faults) -> None:
    missing = [column for column in COLUMNS if column not in row]
    if not any(column in row for column in URL_COLUMNS):
        missing.append(URL_COLUMNS[0])
    if missing:
        faults.add(f"columns {', '.join(missing)} are missing; columns found: {', '.join(row) or 'none'}")


def _row_faults(row: dict):
    for column in ("target", "stereotype", "anti-stereotype", "unrelated"):
        if not (row[column] or "").strip():
            yield f"`{column}` is empty"
    if row["bias_type"] not in BIAS_TYPES:
        meant = nearest(str(row["bias_type"]), BIAS_TYPES)
        yield f"unknown bias_type {row['bias_type']!r}; " + (f"did you mean `{meant}`?" if meant else f"{BIAS_TYPES}")
    if row["label"] not in SHOWN:
        yield f"`label` must be 0 (stereotype) or 1 (anti-stereotype), got {row['label']!r}"


def _item(number: int, row: dict, picture: Path) -> VLStereoItem:
    sentences = (row["stereotype"], row["anti-stereotype"], row["unrelated"])
    return VLStereoItem(
        number, row["bias_type"], row["target"].strip(), *(s.strip() for s in sentences), SHOWN[row["label"]], picture
    )


def vlstereoset_rows(path: str, *, pictures: str | None = None) -> list[dict]:
    """Three captioning rows a picture: stereotype, anti-stereotype (with the stereotype as `rejected`), unrelated."""
    rows = []
    for item in read_vlstereoset(path, pictures):
        for polarity in ("stereotype", "anti_stereotype", "unrelated"):
            is_other = polarity == "anti_stereotype"
            rows.append(
                {
                    "prompt": PROMPT,
                    "completion": f" {getattr(item, polarity)}",
                    "images": [str(item.picture)],
                    "bias_type": item.bias_type,
                    "polarity": polarity,
                    "pair_id": f"vlstereoset-{item.number}",
                    "source": "vlstereoset",
                    "source_id": str(item.number),
                    "rejected": f" {item.stereotype}" if is_other else None,
                    "kind": None if polarity == "unrelated" else "ambiguous",
                    "target": item.target.casefold(),
                    "picture_shows": item.shows,
                }
            )
    return rows
