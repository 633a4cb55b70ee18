"""The n weights that changed most, counted by place, exactly, in memory that does not grow with the model.

A float32 that is not negative orders as its 32 bits do when they are read as an integer. So the n-th largest change is
found by its bits: a first pass over all changes counts them by their upper 20 bits, a second one counts those that
share these with the n-th largest by the 11 bits below, for each place. The two tables take some 15 MB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biasunlearn_trainer.saliency.distribution import Share
from biasunlearn_trainer.saliency.places import Place, Places

LOW_BITS = 11
NUM_LOW, NUM_HIGH = 1 << LOW_BITS, 1 << (31 - LOW_BITS)
INFINITE = 0x7F800000
# Weights looked at together: their integers and flags take some 30 MB.
AT_ONCE = 1 << 20

Changes = Callable[[], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class MostChanged:
    """The n weights that changed most.

    Attributes:
        shares: by place, of all weights there; their chosen numbers add up to n.
        num: n, or the number of weights that changed at all where that is smaller.
        num_changed: weights that changed at all.
        smallest: the smallest change among the chosen, as |w_after - w_before|.
    """

    shares: dict[Place, Share]
    num: int
    num_changed: int
    smallest: float


def most_changed(changes: Changes, places: Places, num: int) -> MostChanged:
    """Count, by place, the `num` weights with the largest absolute change.

    Where the n-th largest change is that of several weights, more than n may have it or more; each place then gets its
    proportion of what is left for these, so that the numbers add up to n and do not depend on any order. A weight that
    did not change is never chosen.

    Args:
        changes: called twice; goes through (name, float change of any shape) of the weights that may have changed.
        places: of the model; its sizes are what shares are of.
        num: n, at least 1.

    Raises:
        ValueError: where n is below 1, or a change is infinite or no number.
    """
    if num < 1:
        raise ValueError(f"The number of most changed weights must be at least 1, got {num}.")
    high = np.zeros(NUM_HIGH, dtype=np.int64)
    num_unchanged = 0
    for name, piece in _pieces(changes):
        if piece.size and piece.max() >= INFINITE:
            raise ValueError(f"The change of {name} is infinite or no number. One of the two models has diverged.")
        high += np.bincount(piece >> LOW_BITS, minlength=NUM_HIGH)
        num_unchanged += int(np.count_nonzero(piece == 0))
    num_changed = int(high.sum()) - num_unchanged
    num = min(num, num_changed)
    if num == 0:
        return MostChanged({place: Share(size) for place, size in places.sizes.items()}, 0, 0, 0.0)
    edge = _reaching(high, num)
    numbers = {place: number for number, place in enumerate(places.sizes)}
    above, low = np.zeros(len(numbers), dtype=np.int64), np.zeros((len(numbers), NUM_LOW), dtype=np.int64)
    for name, piece in _pieces(changes):
        number, upper = numbers[places.of(name)], piece >> LOW_BITS
        above[number] += np.count_nonzero(upper > edge)
        low[number] += np.bincount(piece[upper == edge] & (NUM_LOW - 1), minlength=NUM_LOW)
    last = _reaching(low.sum(0), num - int(above.sum()))
    above += low[:, last + 1 :].sum(1)
    left, ties = num - int(above.sum()), low[:, last].tolist()
    shares = {
        place: Share(size, int(above[numbers[place]]) + left * ties[numbers[place]] / sum(ties))
        for place, size in places.sizes.items()
    }
    smallest = np.array([(edge << LOW_BITS) | last], dtype=np.int32).view(np.float32)[0]
    return MostChanged(shares, num, num_changed, float(smallest))


def _pieces(changes: Changes) -> Iterator[tuple[str, np.ndarray]]:
    """The bits of absolute changes in float32, a million at a time."""
    for name, change in changes():
        flat = change.flatten()
        for start in range(0, flat.numel(), AT_ONCE):
            yield name, flat[start : start + AT_ONCE].float().abs().view(torch.int32).numpy()


def _reaching(counts: np.ndarray, num: int) -> int:
    """The highest index from which on the counts add up to at least `num`."""
    from_top = np.cumsum(counts[::-1])
    return len(counts) - 1 - int(np.searchsorted(from_top, num))
