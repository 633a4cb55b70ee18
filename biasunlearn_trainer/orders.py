"""In which order rows come: shuffles that depend on nothing but their key, and rows of like length put together."""

from __future__ import annotations

import numpy as np

# Steps among whose rows those of like length are put together, at most: the more, the less padding and shuffling.
WINDOW = 50
# Windows into which a set is cut, at least: in a single one every epoch would have the same batches.
FEWEST_WINDOWS = 4


def order(length: int, *key: int | str) -> np.ndarray:
    """A permutation of `range(length)`, the same for the same key on every machine.

    Args:
        length: number of rows.
        key: seed, stream, epoch: whatever the order shall depend on.

    Example:
        >>> sorted(order(4, 42, "forget", 0).tolist())
        [0, 1, 2, 3]
        >>> (order(4, 42, "forget", 0) == order(4, 42, "forget", 0)).all()
        np.True_
    """
    words = [int.from_bytes(str(part).encode(), "little") for part in key]
    return np.random.default_rng(np.random.SeedSequence(words)).permutation(length)


def by_length(shuffled: np.ndarray, lengths: np.ndarray, start: int, rows_per_step: int, seed: int) -> np.ndarray:
    """Put rows of like length into one optimizer step, and leave the steps in a random order.

    The shuffled rows are cut into windows of up to `WINDOW` steps. Within a window each step has a rank, and rows are
    dealt to steps in the order of their lengths: the short ones to the step of the lowest rank. The ranks depend on
    seed and step alone, so that all streams have long rows in the same steps, as one forward pass over several
    streams is padded to the longest. The step, and not the micro-batch, is what is put together, so that its rows
    are the same however it is cut into batches, accumulation and processes; inside it rows go by length, too.

    The very first step has the highest rank, and the longest of all rows: what does not fit the memory shows at once.

    Args:
        shuffled: (n,) a permutation of the rows.
        lengths: (n,) of the rows, in any unit.
        start: the place of the first of them since training began; steps begin at multiples of `rows_per_step`.
        rows_per_step: rows of an optimizer step.
        seed: what ranks depend on.

    Returns:
        (n,) int32 the permutation, regrouped.

    Example:
        >>> lengths = np.array([5, 9] * 8)
        >>> lengths[by_length(order(16, 1), lengths, start=0, rows_per_step=2, seed=0)].tolist()
        [9, 9, 5, 5, 9, 9, 5, 5, 9, 9, 5, 5, 9, 9, 5, 5]
    """
    grouped = shuffled.astype(np.int32)
    if start == 0:
        longest = lengths[grouped].argmax()
        grouped[[0, longest]] = grouped[[longest, 0]]
    window = max(1, min(WINDOW, len(grouped) // (FEWEST_WINDOWS * rows_per_step))) * rows_per_step
    for first in range(-(start % window), len(grouped), window):
        part = grouped[max(first, 0) : first + window]
        steps = (start + max(first, 0) + np.arange(len(part))) // rows_per_step
        # Sorting is stable: rows of one length stay shuffled, places of one step in a row.
        places = np.argsort(_ranks(steps, seed), kind="stable")
        part[places] = part[np.argsort(lengths[part], kind="stable")]
    return grouped


def _ranks(steps: np.ndarray, seed: int) -> np.ndarray:
    """(n,) for each of some ascending steps its rank among the `WINDOW` steps that begin at a multiple of it."""
    blocks, first = np.unique(steps // WINDOW, return_inverse=True)
    ranks = np.stack([order(WINDOW, seed, "lengths", int(block)) for block in blocks]).astype(np.int16)
    return np.where(steps == 0, WINDOW, ranks[first, steps % WINDOW])
