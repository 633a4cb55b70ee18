"""Rows that say nearly the same: what is trained on must not be reported in other words or on a copied picture.

Two texts are as similar as the share of word pairs that they have in common (Jaccard similarity of their sets of word
bigrams; case and punctuation aside). Candidates are found by their rarest word pairs (prefix filtering; Bayardo, Ma and
Srikant 2007, "Scaling up all pairs similarity search"), which misses none, and then compared. Pictures are near where
their difference hashes are (at most 4 of 64 bits).
"""

import io
import itertools
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from biasunlearn_trainer.data_builders.images import image_bytes, image_key

MAX_DIFFERENT_BITS = 4
NUM_BITS = 512
_WORDS = re.compile(r"\w+")


@dataclass(frozen=True)
class NearDuplicate:
    """A row that is nearly one of the rows it is compared with: its number, theirs, and the similarity in 0..1."""

    row: int
    other: int
    similarity: float


def row_text(row: Mapping[str, Any]) -> str:
    """Prompt and completion in plain words."""
    return f"{plain_text(row['prompt'])} {plain_text(row['completion'])}".strip()


def plain_text(value: Any) -> str:
    """A prompt or completion without roles: text as it is, messages' texts joined."""
    if isinstance(value, str):
        return value
    parts = []
    for message in value or []:
        content = message["content"]
        parts += [content] if isinstance(content, str) else [part.get("text") or "" for part in content]
    return " ".join(parts)


def shingles(text: str) -> np.ndarray:
    """The sorted 32-bit hashes of a text's word pairs; of one word, its own; of none, that of nothing.

    >>> len(shingles("The cat sat. the CAT sat!"))
    3
    """
    words = _WORDS.findall(text.casefold())
    pairs = itertools.pairwise(words) if len(words) > 1 else [tuple(words)]
    return np.unique(np.array([zlib.crc32(" ".join(pair).encode()) for pair in pairs], dtype=np.uint32))


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Jaccard similarity of two sets of shingles, in 0..1."""
    common = np.intersect1d(first, second, assume_unique=True).size
    return common / (first.size + second.size - common)


class NearDuplicates:
    """Rows to compare others with.

    Memory grows with these rows and not with those that are compared: index the smaller side, the reported rows.

    Args:
        rows: in the schema's columns.
        threshold: from which similarity on two texts are nearly the same, in (0, 1].
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], threshold: float = 0.9):
        self.threshold = threshold
        texts, self._images = [], {}
        for number, row in enumerate(rows):
            texts.append(shingles(row_text(row)))
            if row.get("images"):
                self._images[number] = row["images"]
        self._ends = np.cumsum([0, *(words.size for words in texts)])
        self._shingles = np.concatenate([np.empty(0, np.uint32), *texts])
        self._known, self._counts = np.unique(self._shingles, return_counts=True)
        self._bits = np.array([_bits(words) for words in texts], np.uint64).reshape(len(texts), NUM_BITS // 64)
        self._rows_with: dict[int, list[int]] = {}
        for number in range(len(texts)):
            for shingle in self._rarest(self._words(number)):
                self._rows_with.setdefault(shingle, []).append(number)
        self._hashes: dict[Any, int] = {}

    def _words(self, number: int) -> np.ndarray:
        return self._shingles[self._ends[number] : self._ends[number + 1]]

    def _rarest(self, words: np.ndarray) -> list[int]:
        """The shingles of which two texts at the threshold share one, whichever the others are.

        They share at least `threshold` of this text's, so that of the rest and one more, in an order that holds for all
        texts, one is shared; in the order of how rare they are it is shared with few others.
        """
        num = words.size - math.ceil(self.threshold * words.size - 1e-9) + 1
        counts = np.zeros(words.size, np.int64)
        if self._known.size:
            places = np.minimum(np.searchsorted(self._known, words), self._known.size - 1)
            counts = np.where(self._known[places] == words, self._counts[places], 0)
        # Of two that are as rare the order of `words` decides, which is that of their hashes.
        return words[np.argsort(counts, kind="stable")[:num]].tolist()

    def nearest(self, row: Mapping[str, Any], number: int = 0) -> NearDuplicate | None:
        """The most similar row at or above the threshold whose pictures are near too, or None."""
        words, images = shingles(row_text(row)), row.get("images") or []
        for value, other in sorted(self._near_texts(words, self._candidates(words)), reverse=True):
            if self._are_near(images, self._images.get(-other, [])):
                return NearDuplicate(number, -other, value)
        return None

    def _candidates(self, words: np.ndarray) -> np.ndarray:
        """The rows that share a rare shingle, and whose bits allow the similarity.

        Two texts at the threshold t differ in at most (1 - t) / (1 + t) of their shingles, and bits differ in no more.
        """
        shared = np.array(
            list({other for shingle in self._rarest(words) for other in self._rows_with.get(shingle, ())}), np.int64
        )
        sizes = self._ends[shared + 1] - self._ends[shared]
        different = np.bitwise_count(self._bits[shared] ^ _bits(words)).sum(axis=1, dtype=np.int64)
        return shared[different <= (1 - self.threshold) / (1 + self.threshold) * (sizes + words.size) + 1e-9]

    def _near_texts(self, words: np.ndarray, others: np.ndarray) -> list[tuple[float, int]]:
        """Similarity and negated number of the rows at the threshold, all compared at once."""
        if not others.size:
            return []
        sizes = self._ends[others + 1] - self._ends[others]
        theirs = np.concatenate([self._words(other) for other in others.tolist()])
        is_common = words[np.minimum(np.searchsorted(words, theirs), words.size - 1)] == theirs
        common = np.add.reduceat(is_common, np.cumsum(sizes) - sizes, dtype=np.int64)
        values = common / (words.size + sizes - common)
        near = values >= self.threshold
        return list(zip(values[near].tolist(), (-others[near]).tolist(), strict=True))

    def _are_near(self, first: list, second: list) -> bool:
        if len(first) != len(second):
            return False
        return all(
            (self._hash(one) ^ self._hash(other)).bit_count() <= MAX_DIFFERENT_BITS
            for one, other in zip(first, second, strict=True)
        )

    def _hash(self, image: Any) -> int:
        key = image_key(image)
        if key not in self._hashes:
            self._hashes[key] = difference_hash(PIL.Image.open(io.BytesIO(image_bytes(image))))
        return self._hashes[key]


def _bits(words: np.ndarray) -> np.ndarray:
    """A bit for each shingle, by its hash; several may share one."""
    flags = np.zeros(NUM_BITS, np.uint8)
    flags[words % NUM_BITS] = 1
    return np.packbits(flags).view(np.uint64)


def difference_hash(picture: PIL.Image.Image) -> int:
    """64 bits: of a picture shrunk to 9 x 8 grey pixels, whether each is brighter than its right neighbour."""
    grey = np.asarray(picture.convert("L").resize((9, 8)), dtype=np.int16)
    return int.from_bytes(np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes(), "big")


def find_near_duplicates(
    rows: Iterable[Mapping[str, Any]],
    others: Iterable[Mapping[str, Any]],
    threshold: float = 0.9,
) -> list[NearDuplicate]:
    """Compares every row with the others.

    Args:
        rows: streamed.
        others: held in memory as hashes.
        threshold: as in `NearDuplicates`.
    """
    index = NearDuplicates(others, threshold)
    found = (index.nearest(row, number) for number, row in enumerate(rows))
    return [near for near in found if near is not None]
