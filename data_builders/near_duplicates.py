"""Rows that say nearly the same: what is trained on must not be reported in other words or on a copied picture.

Two texts are as similar as the share of word pairs that they have in common (Jaccard similarity of their sets of word
bigrams; case and punctuation aside). Candidates are found by their rarest word pairs (prefix filtering; Bayardo, Ma and
Srikant 2007, "Scaling up all pairs similarity search"), which misses none, and then compared, many at a time. Pictures
are near where their difference hashes are (at most 4 of 64 bits).
"""

import functools
import io
import re
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import PIL.Image

from biasunlearn_trainer.data_builders.images import image_bytes, image_key

MAX_DIFFERENT_BITS = 4
BATCH_SIZE = 1024
COMPARED = 1 << 20
"""Shingles that are compared at a time: what bounds the memory of a search, whatever the texts have in common."""
NUM_COUNTS, NUM_BITS = 1 << 21, 512
_WORDS = re.compile(r"\w+")
# Odd numbers without a pattern: they make one number of two hashes in which their order counts.
_FIRST, _SECOND = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)


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
    return _shingles_of([text])[0]


def _shingles_of(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """The shingles of texts, one text after another, and where each text's begin, with one more place for the end."""
    hashes, sizes = array("I"), []
    for text in texts:
        words = _WORDS.findall(text.casefold())
        words = words if len(words) > 1 else [*words, "", ""][:2]
        hashes.extend(map(_word_hash, words))
        sizes.append(len(words))
    words = np.array(hashes, np.uint64)
    texts_of = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)
    pairs = (words[:-1] * _FIRST + words[1:] * _SECOND) >> np.uint64(32)
    keys = _keys(texts_of[:-1], pairs)[texts_of[:-1] == texts_of[1:]]
    keys.sort()
    keys = keys[np.diff(keys, prepend=~keys[:1]) != 0]
    starts = np.searchsorted(keys, _keys(np.arange(len(sizes) + 1, dtype=np.uint64), np.uint64(0)))
    return keys.astype(np.uint32), starts


@functools.lru_cache(maxsize=1 << 14)
def _word_hash(word: str) -> int:
    # Half a surrogate pair, which JSON may hold, is no UTF-8.
    return zlib.crc32(word.encode("utf-8", "surrogatepass"))


def _keys(texts: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Numbers of texts and their shingles in 64 bits, which sort by text and then by shingle."""
    return texts << np.uint64(32) | hashes


def _bits(words: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """A bit for each shingle of a text, by its hash; several may share one."""
    flags = np.zeros((len(starts) - 1, NUM_BITS), np.uint8)
    flags[np.repeat(np.arange(len(starts) - 1), np.diff(starts)), words % NUM_BITS] = 1
    return np.packbits(flags, axis=1).view(np.uint64)


def _places(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The places of several pieces of an array, one piece after another."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


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
        self.threshold, self._images = threshold, {}
        texts, sizes, number = [np.empty(0, np.uint32)], [np.zeros(1, np.int64)], 0
        bits = [np.empty((0, NUM_BITS // 64), np.uint64)]
        self._counts = np.zeros(NUM_COUNTS, np.int32)
        for batch in _batches(rows):
            found, starts = _shingles_of(map(row_text, batch))
            texts.append(found)
            sizes.append(np.diff(starts))
            bits.append(_bits(found, starts))
            self._images.update((n, row["images"]) for n, row in enumerate(batch, start=number) if row.get("images"))
            number += len(batch)
            np.add.at(self._counts, found % NUM_COUNTS, 1)
        self._shingles = np.concatenate(texts)
        self._starts, self._bits = np.cumsum(np.concatenate(sizes)), np.concatenate(bits)
        self._prefixes, self._rows_with = self._postings()
        self._hashes: dict[Any, int] = {}

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._starts) - 1

    def _postings(self) -> tuple[np.ndarray, np.ndarray]:
        """The rarest shingles of all rows, sorted, and the row of each."""
        prefixes, rows = [np.empty(0, np.uint32)], [np.empty(0, np.int32)]
        for first in range(0, len(self), BATCH_SIZE):
            starts = self._starts[first : first + BATCH_SIZE + 1]
            rarest, ends = self._rarest(self._shingles[starts[0] : starts[-1]], starts - starts[0])
            prefixes.append(rarest)
            rows.append(np.repeat(np.arange(first, first + len(starts) - 1, dtype=np.int32), np.diff(ends)))
        order = np.argsort(np.concatenate(prefixes), kind="stable")
        return np.concatenate(prefixes)[order], np.concatenate(rows)[order]

    def _rarest(self, words: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of each text the shingles of which two texts at the threshold share one, whichever the others are.

        They share at least `threshold` of this text's, so that of the rest and one more, in an order that holds for all
        texts, one is shared; in the order of how rare they are it is shared with few others. Rarity is counted by some
        bits of the hash: where two are counted together, the order is another one, which holds for all texts as well.
        """
        sizes = np.diff(starts)
        num = sizes - np.ceil(self.threshold * sizes - 1e-9).astype(np.int64) + 1
        texts = np.repeat(np.arange(sizes.size), sizes)
        # Stable: of two that are as rare the order of `words` decides, which is that of their hashes.
        order = np.argsort(texts << 32 | self._counts[words % NUM_COUNTS], kind="stable")
        rank = np.arange(words.size) - np.repeat(starts[:-1], sizes)
        return words[order[rank < np.repeat(num, sizes)]], np.concatenate([[0], np.cumsum(num)])

    def nearest(self, row: Mapping[str, Any], number: int = 0) -> NearDuplicate | None:
        """As `search`, of one row."""
        near = next(self.search([row]))
        return near and NearDuplicate(number, near.other, near.similarity)

    def search(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[NearDuplicate | None]:
        """Yields for each row one at or above the threshold whose pictures are near too, or None.

        Where several are near, it is the most similar of those that were compared at the same time: a text that
        thousands of rows repeat is not compared with all of them.
        """
        number = 0
        for batch in _batches(rows):
            found = self._search(batch)
            for place in range(len(batch)):
                other, value = found.get(place, (None, 0.0))
                yield None if other is None else NearDuplicate(number + place, other, value)
            number += len(batch)

    def _search(self, batch: Sequence[Mapping[str, Any]]) -> dict[int, tuple[int, float]]:
        words, starts = _shingles_of(map(row_text, batch))
        sizes, bits = np.diff(starts), _bits(words, starts)
        keys = _keys(np.repeat(np.arange(sizes.size, dtype=np.uint64), sizes), words)
        rarest, first = self._rarest(words, starts)
        stops = np.searchsorted(self._prefixes, rarest, "right")
        # All candidates of the batch are numbered; those of a row follow one another.
        ends = np.cumsum(stops - np.searchsorted(self._prefixes, rarest, "left"))
        bounds = np.concatenate([[0], ends])[first]
        place, end = bounds[:-1].copy(), bounds[1:]
        found: dict[int, tuple[int, float]] = {}
        while (active := np.flatnonzero(place < end)).size:
            num = np.maximum(COMPARED // active.size // sizes[active], 1)
            num = np.minimum(num, end[active] - place[active])
            numbers = _places(place[active], num)
            lists = np.searchsorted(ends, numbers, "right")
            others = self._rows_with[stops[lists] - (ends[lists] - numbers)]
            place[active] += num
            pairs = np.unique(np.repeat(active, num) << 32 | others)
            pairs = self._likely(pairs >> 32, pairs & 0xFFFFFFFF, sizes, bits)
            for row, other, value in self._near_texts(keys, sizes, *pairs):
                if row not in found and self._are_near(batch[row].get("images") or [], self._images.get(other, [])):
                    found[row] = other, value
                    place[row] = end[row]
        return found

    def _likely(
        self, rows: np.ndarray, others: np.ndarray, sizes: np.ndarray, bits: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Of pairs those whose bits allow the similarity.

        Two texts at the threshold t differ in at most (1 - t) / (1 + t) of their shingles, and bits differ in no more.
        """
        both = sizes[rows] + self._starts[others + 1] - self._starts[others]
        different = np.bitwise_count(bits[rows] ^ self._bits[others]).sum(axis=1, dtype=np.int64)
        likely = different <= (1 - self.threshold) / (1 + self.threshold) * both + 1e-9
        return rows[likely], others[likely]

    def _near_texts(
        self, keys: np.ndarray, sizes: np.ndarray, rows: np.ndarray, others: np.ndarray
    ) -> Iterable[tuple[int, int, float]]:
        """Of pairs those at the threshold, with their similarity, the most similar of a row first."""
        mine, theirs = sizes[rows], self._starts[others + 1] - self._starts[others]
        if not rows.size:
            return ()
        asked = _keys(np.repeat(rows, theirs).astype(np.uint64), self._shingles[_places(self._starts[others], theirs)])
        is_common = keys[np.minimum(np.searchsorted(keys, asked), keys.size - 1)] == asked
        common = np.add.reduceat(is_common, np.cumsum(theirs) - theirs, dtype=np.int64)
        values = common / (mine + theirs - common)
        near = np.flatnonzero(values >= self.threshold)
        near = near[np.lexsort((others[near], -values[near], rows[near]))]
        return zip(rows[near].tolist(), others[near].tolist(), values[near].tolist(), strict=True)

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


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(rows)
    while batch := list(islice(rows, BATCH_SIZE)):
        yield batch


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
    return [near for near in NearDuplicates(others, threshold).search(rows) if near is not None]
