"""Rows that stand in two sets at once: trained to be forgotten and kept, or trained on and then reported."""

import functools
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


def _row_keys(row: dict, both_answers: bool, digest: Any) -> list[bytes]:
    answers = [row["completion"], row.get("rejected")] if both_answers else [row["completion"]]
    pictures = [digest(image) for image in row.get("images") or []]
    keys = []
    for answer in answers:
        if answer is not None:
            texts = json.dumps([_text(row["prompt"]), _text(answer)]).encode()
            keys.append(hashlib.blake2b(b"\0".join([texts, *pictures]), digest_size=16).digest())
    return keys


def _index(dataset: Dataset | Sequence[dict], both_answers: bool, digest: Any) -> dict[bytes, list[int]]:
    """Maps a row's digest to the rows that have it: 16 bytes a row are kept, whatever its length."""
    index: dict[bytes, list[int]] = {}
    for number, row in enumerate(undecoded(dataset)):
        for key in _row_keys(row, both_answers, digest):
            index.setdefault(key, []).append(number)
    return index


def _picture_digest():
    """Returns a function from a stored picture to the digest of its content; a file is read once."""

    @functools.cache
    def of_path(path: str) -> bytes:
        return content_digest(image_bytes(path))

    def digest(image: Any) -> bytes:
        key = image_key(image)
        return of_path(key) if isinstance(key, str) else content_digest(image_bytes(image))

    return digest


def find_leakage(
    sets: Mapping[str, Dataset | Sequence[dict]], pairs: Iterable[tuple[str, str]] = PAIRS_OF_SETS
) -> list[Leak]:
    """Names the rows that two sets share.

    Two rows are the same if prompt, completion (up to white space) and the bytes of all pictures are; the same question
    about two pictures is no leak, and a picture that was encoded anew counts as another one. In the sets named "report"
    and "probe" a row's `rejected` answer counts like its completion: a forget row holds a question's biased answer.

    Args:
        sets: Sets by name.
        pairs: Which names may not share rows; pairs with a name that is not in `sets` are passed over.

    Returns:
        One `Leak` a row of the second set of a pair, in the order of its rows.

    Raises:
        ValueError: None of the pairs is in `sets`, so that nothing would be checked.
    """
    wanted = [pair for pair in pairs if pair[0] in sets and pair[1] in sets]
    if not wanted:
        raise ValueError(f"no pair of {list(pairs)} is among the sets {list(sets)}; nothing to compare")
    digest = _picture_digest()
    names = dict.fromkeys(name for pair in wanted for name in pair)
    indexes = {name: _index(sets[name], name in EVALUATION_SETS, digest) for name in names}
    leaks = []
    for first, second in wanted:
        shared = indexes[first].keys() & indexes[second].keys()
        first_row_of = {row: indexes[first][key][0] for key in shared for row in indexes[second][key]}
        matches = sorted((row, first_row) for row, first_row in first_row_of.items())
        shown = _rows_at(sets[first], [first_row for _, first_row in matches])
        for (second_row, first_row), row in zip(matches, shown, strict=True):
            texts = _text(row["prompt"]), _text(row["completion"])
            leaks.append(Leak(first, first_row, second, second_row, *texts, len(row.get("images") or [])))
    return leaks


def _rows_at(dataset: Dataset | Sequence[dict], indices: list[int]) -> Iterable[dict]:
    if isinstance(dataset, Dataset):
        return undecoded(dataset.select(indices))
    return [dataset[index] for index in indices]


def check_leakage(
    sets: Mapping[str, Dataset | Sequence[dict]],
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
