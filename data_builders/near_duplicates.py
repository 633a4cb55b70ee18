"""Rows that say nearly the same: what is trained on must not be reported in other words or on a copied picture.

Two texts are as similar as the share of word pairs that they have in common (Jaccard similarity of their sets of word
bigrams; case and punctuation aside). Candidates are found by MinHash in bands, then compared exactly, so that nothing
below the threshold is named; of pairs at 0.9 the bands miss 1 in 5,000 and the signatures 1 in 1,000. Pictures are
near where their difference hashes are (at most 4 of 64 bits).
"""

import io
import itertools
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from biasunlearn_trainer.data_builders.images import image_bytes, image_key

NUM_BANDS, ROWS_PER_BAND = 8, 4
# Of 32 minima at similarity 0.9 the share that agrees has a standard deviation of 0.05: four of them.
SIGNATURE_MARGIN = 0.2
MAX_DIFFERENT_BITS = 4
_PRIME = (1 << 61) - 1
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
        seed: of the hash functions.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], threshold: float = 0.9, seed: int = 0):
        self.threshold = threshold
        random = np.random.default_rng(seed)
        # Of a * x + b only the lower 64 bits are kept; odd factors make it a permutation of them.
        self._factors = random.integers(1, _PRIME, NUM_BANDS * ROWS_PER_BAND, dtype=np.uint64) | np.uint64(1)
        self._offsets = random.integers(0, _PRIME, NUM_BANDS * ROWS_PER_BAND, dtype=np.uint64)
        self._buckets: dict[tuple[int, bytes], list[int]] = {}
        self._rows: list[tuple[np.ndarray, list]] = []
        self._hashes: dict[Any, int] = {}
        signatures = []
        for number, row in enumerate(rows):
            words = shingles(row_text(row))
            self._rows.append((words, row.get("images") or []))
            signatures.append(self._signature(words))
            for key in _bands(signatures[-1]):
                self._buckets.setdefault(key, []).append(number)
        self._signatures = np.array(signatures)
        self._sizes = np.array([words.size for words, _ in self._rows])

    def _signature(self, words: np.ndarray) -> np.ndarray:
        mixed = words[:, None].astype(np.uint64) * self._factors + self._offsets
        return (mixed >> np.uint64(32)).min(axis=0).astype(np.uint32)

    def nearest(self, row: Mapping[str, Any], number: int = 0) -> NearDuplicate | None:
        """The most similar row at or above the threshold whose pictures are near too, or None."""
        words, images = shingles(row_text(row)), row.get("images") or []
        found = [(similarity(words, self._rows[other][0]), -other) for other in self._candidates(words)]
        for value, other in sorted(found, reverse=True):
            if value < self.threshold:
                return None
            if self._are_near(images, self._rows[-other][1]):
                return NearDuplicate(number, -other, value)
        return None

    def _candidates(self, words: np.ndarray) -> list[int]:
        """The rows that share a band, without those whose size or signature says that they are too far."""
        signature = self._signature(words)
        shared = {other for key in _bands(signature) for other in self._buckets.get(key, ())}
        if not shared:
            return []
        others = np.fromiter(shared, dtype=np.int64, count=len(shared))
        sizes = self._sizes[others]
        near_in_size = np.minimum(sizes, words.size) >= self.threshold * np.maximum(sizes, words.size)
        others = others[near_in_size]
        agreement = (self._signatures[others] == signature).mean(axis=1)
        return others[agreement >= self.threshold - SIGNATURE_MARGIN].tolist()

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


def _bands(signature: np.ndarray) -> Iterator[tuple[int, bytes]]:
    for band in range(NUM_BANDS):
        yield band, signature[band * ROWS_PER_BAND : (band + 1) * ROWS_PER_BAND].tobytes()


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
