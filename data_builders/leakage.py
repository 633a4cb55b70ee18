"""Rows that stand in two sets at once: trained to be forgotten and kept, or trained on and then reported."""

import functools
import hashlib
import io
import json
import logging
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset

from biasunlearn_trainer.data_builders.images import content_digest, image_bytes, image_key, undecoded

logger = logging.getLogger(__name__)

# A fact may stand both in the retain set and among the reported facts (that is what "kept" means), so retain against
# report is looked at only on request.
PAIRS_OF_SETS = (("forget", "retain"), ("forget", "report"), ("forget", "probe"), ("probe", "report"))
# In these sets `completion` is the right answer and `rejected` the biased one: training on either is a leak.
EVALUATION_SETS = ("probe", "report")


@dataclass(frozen=True)
class Leak:
    """One row of the second set that the first set holds too.

    Attributes:
        first: Name of the first set.
        first_row: The row's index in it, from 0 (the first of several).
        second: Name of the second set.
        second_row: The row's index in it, from 0.
        prompt: The shared prompt, as text.
        completion: The shared answer, as text.
        num_images: Number of pictures that are the same too.
    """

    first: str
    first_row: int
    second: str
    second_row: int
    prompt: str
    completion: str
    num_images: int

    def __str__(self) -> str:
        """Names both rows."""
        pictures = f", {self.num_images} picture(s)" if self.num_images else ""
        where = f"{self.first}[{self.first_row}] = {self.second}[{self.second_row}]"
        return f"{where}: {self.prompt!r:.80} -> {self.completion!r:.60}{pictures}"


def _text(value: Any) -> str:
    """Canonical text of a prompt or completion: white space counts as one blank, messages as role and content."""
    if isinstance(value, str):
        return " ".join(value.split())
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _text_keys(row: dict, both_answers: bool) -> list[bytes]:
    answers = [row["completion"], row.get("rejected")] if both_answers else [row["completion"]]
    texts = [json.dumps([_text(row["prompt"]), _text(answer)]) for answer in answers if answer is not None]
    return [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]


class _Keys:
    """Of each answer in a set 64 bits of its text and the number of its row; pictures are not read.

    Sixteen bytes an answer are all that is held of a set; what two sets share is then compared by whole digests.
    """

    def __init__(self, dataset: Dataset | Iterable[dict], both_answers: bool):
        self._both_answers = both_answers
        keys, rows = array("Q"), array("Q")
        for number, row in enumerate(_without_pictures(dataset)):
            for key in _text_keys(row, both_answers):
                keys.append(int.from_bytes(key[:8], "big"))
                rows.append(number)
        self.keys, self._rows = np.array(keys, np.uint64), np.array(rows, np.int64)

    def rows_with(self, shared: np.ndarray) -> list[int]:
        """The rows of which a key is among the shared ones, in order."""
        return np.unique(self._rows[np.isin(self.keys, shared)]).tolist()

    def by_content(
        self, dataset: Dataset | Iterable[dict], shared: np.ndarray, digest: Callable
    ) -> dict[tuple, list[int]]:
        """Maps the digest of text and pictures to the rows that have them, of rows with a shared key."""
        numbers = self.rows_with(shared)
        index: dict[tuple, list[int]] = {}
        for number, row in zip(numbers, _rows_at(dataset, numbers), strict=True):
            pictures = tuple(digest(image) for image in _images(row))
            for key in _text_keys(row, self._both_answers):
                index.setdefault((key, *pictures), []).append(number)
        return index


def _without_pictures(dataset: Dataset | Iterable[dict]) -> Iterable[dict]:
    if isinstance(dataset, Dataset) and "images" in dataset.column_names:
        dataset = dataset.remove_columns("images")
    return undecoded(dataset)


def _picture_digest(sets: Iterable[Dataset | Iterable[dict]]) -> Callable[[Any], bytes]:
    """How a picture's identity is taken: by its encoded bytes; by its pixels where a set holds decoded pictures."""
    cached = {}

    @functools.cache
    def identity() -> Callable[[Any], bytes]:
        # Found out when the first picture is compared: sets without shared texts are not gone through for it.
        plain = [rows for rows in sets if not isinstance(rows, Dataset)]
        by_pixels = any(isinstance(image, PIL.Image.Image) for rows in plain for row in rows for image in _images(row))
        return _pixels if by_pixels else image_bytes

    def digest(image: Any) -> bytes:
        # A decoded picture has no name to remember it by.
        if isinstance(image, PIL.Image.Image):
            return content_digest(identity()(image))
        key = image_key(image)
        if key not in cached:
            cached[key] = content_digest(identity()(image))
        return cached[key]

    return digest


def _images(row: dict) -> list:
    return row.get("images") or []


def _pixels(image: Any) -> bytes:
    if not isinstance(image, PIL.Image.Image):
        image = PIL.Image.open(io.BytesIO(image_bytes(image)))
    return repr(image.size).encode() + image.convert("RGBA").tobytes()


def find_leakage(
    sets: Mapping[str, Dataset | Iterable[dict]], pairs: Iterable[tuple[str, str]] = PAIRS_OF_SETS
) -> list[Leak]:
    """Names the rows that two sets share.

    Two rows are the same if prompt, completion (up to white space) and all pictures are; the same question about two
    pictures is no leak. A picture is the same if its encoded bytes are (one that was encoded anew is another one), or,
    where one of the sets is a list of rows with decoded pictures, if its pixels are. In the sets named "report"
    and "probe" a row's `rejected` answer counts like its completion: a forget row holds a question's biased answer.

    Args:
        sets: Sets by name; what is no `Dataset` is gone through more than once.
        pairs: Which names may not share rows; pairs with a name that is not in `sets` are passed over.

    Returns:
        One `Leak` a row of the second set of a pair, in the order of its rows.

    Raises:
        ValueError: None of the pairs is in `sets`, so that nothing would be checked.
    """
    wanted = [pair for pair in pairs if pair[0] in sets and pair[1] in sets]
    if not wanted:
        raise ValueError(f"no pair of {list(pairs)} is among the sets {list(sets)}; nothing to compare")
    names = dict.fromkeys(name for pair in wanted for name in pair)
    digest = _picture_digest([sets[name] for name in names])
    texts = {name: _Keys(sets[name], name in EVALUATION_SETS) for name in names}
    leaks = []
    for first, second in wanted:
        shared = np.intersect1d(texts[first].keys, texts[second].keys)
        in_first = texts[first].by_content(sets[first], shared, digest)
        in_second = texts[second].by_content(sets[second], shared, digest)
        first_row_of = {row: in_first[key][0] for key in in_first.keys() & in_second.keys() for row in in_second[key]}
        matches = sorted(first_row_of.items())
        shown = _rows_at(sets[first], [first_row for _, first_row in matches])
        for (second_row, first_row), row in zip(matches, shown, strict=True):
            prompt, answer = _text(row["prompt"]), _text(row["completion"])
            leaks.append(Leak(first, first_row, second, second_row, prompt, answer, len(_images(row))))
    return leaks


def _rows_at(dataset: Dataset | Iterable[dict], indices: list[int]) -> Iterable[dict]:
    """The rows of these numbers, in the order in which they are asked for."""
    if isinstance(dataset, Dataset):
        return undecoded(dataset.select(indices))
    wanted = set(indices)
    rows = {number: row for number, row in enumerate(dataset if wanted else ()) if number in wanted}
    return [rows[number] for number in indices]


def check_leakage(
    sets: Mapping[str, Dataset | Iterable[dict]],
    *,
    on_leak: str = "raise",
    num_shown: int = 5,
    pairs: Iterable[tuple[str, str]] = PAIRS_OF_SETS,
) -> list[Leak]:
    """Looks for shared rows and says so.

    Args:
        sets: Sets by name, as in `find_leakage`.
        on_leak: "raise" or "warn".
        num_shown: How many leaks a pair of sets are spelt out.
        pairs: Which names may not share rows.

    Returns:
        All leaks (with "warn").

    Raises:
        ValueError: Rows are shared, and `on_leak` is "raise"; or `on_leak` is neither word.
    """
    if on_leak not in ("raise", "warn"):
        raise ValueError(f"`on_leak` must be 'raise' or 'warn', got {on_leak!r}.")
    leaks = find_leakage(sets, pairs)
    by_pair: dict[tuple[str, str], list[Leak]] = {}
    for leak in leaks:
        by_pair.setdefault((leak.first, leak.second), []).append(leak)
    lines = []
    for (first, second), shared in by_pair.items():
        lines.append(f"{len(shared)} row(s) of the {second} set are in the {first} set too; take them out of one:")
        lines += [f"  - {leak}" for leak in shared[:num_shown]]
        if len(shared) > num_shown:
            lines.append(f"  - ... and {len(shared) - num_shown} more")
    if lines and on_leak == "raise":
        raise ValueError("\n".join(lines))
    if lines:
        logger.warning("\n".join(lines))
    return leaks
