"""Orders: shuffles by key, and rows of like length in one step."""

import numpy as np
import pytest

from biasunlearn_trainer.orders import WINDOW, by_length, order


def widths(lengths, rows_per_step):
    """(steps,) by how much the rows of a step differ in length."""
    return np.array([np.ptp(lengths[i : i + rows_per_step]) for i in range(0, len(lengths), rows_per_step)])


def test_orders_are_those_that_they_have_always_been():
    """A seed of an earlier version gives the same run."""
    assert order(6, 42, "forget", 0).tolist() == [2, 5, 4, 0, 3, 1]


def test_by_hand():
    """Sixteen rows by two: eight steps, windows of two. A window of four 1s has nothing to put together."""
    lengths = np.array([1, 9, 1, 9, 1, 1, 1, 1, 9, 1, 1, 9, 9, 9, 9, 9])
    grouped = lengths[by_length(np.arange(16), lengths, start=16, rows_per_step=2, seed=0)]
    assert [sorted(grouped[i : i + 4].tolist()) for i in range(0, 16, 4)] == [
        [1, 1, 9, 9],
        [1, 1, 1, 1],
        [1, 1, 9, 9],
        [9, 9, 9, 9],
    ]
    assert (widths(grouped, 2) == 0).all()


@pytest.mark.parametrize("start", [0, 16, 1003])
def test_every_row_stays_and_steps_are_of_like_length(start):
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    shuffled = order(4000, 1)
    grouped = by_length(shuffled, lengths, start, 16, 0)
    assert sorted(grouped) == list(range(4000))
    first = -start % 16  # where a step begins
    assert widths(lengths[grouped][first:], 16).mean() < widths(lengths[shuffled], 16).mean() / 10
    assert (np.diff(lengths[grouped][first : first + 16]) >= 0).all()  # micro-batches inside a step, too


def test_steps_come_in_a_random_order():
    lengths = np.random.default_rng(0).integers(1, 1000, 4000)
    grouped = lengths[by_length(order(4000, 1), lengths, 16, 16, 0)]
    means = grouped.reshape(-1, 16).mean(1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.2


def test_epochs_have_other_batches():
    lengths = np.random.default_rng(0).integers(1, 30, 200)
    epochs = [by_length(order(200, epoch), lengths, 200 * epoch, 4, 0) for epoch in (1, 2)]
    first, second = ({frozenset(epoch[i : i + 4]) for i in range(0, 200, 4)} for epoch in epochs)
    assert len(first & second) < 3


def test_the_longest_row_comes_in_the_first_step_and_in_no_other_first_step():
    lengths = np.arange(4000)
    for seed in range(5):
        assert 3999 in by_length(order(4000, seed), lengths, 0, 16, seed)[:16]
    assert not all(3999 in by_length(order(4000, seed), lengths, 16, 16, seed)[:16] for seed in range(5))


def test_two_sets_have_their_long_rows_in_the_same_steps():
    """Sets of other sizes, one in the middle of its cycle, with other rows a step."""
    rng = np.random.default_rng(0)
    first, second = rng.integers(1, 1000, 8000), rng.integers(1, 50, 3000)
    a = first[by_length(order(8000, 0), first, 0, 16, seed=3)].reshape(-1, 16).mean(1)
    b = second[by_length(order(3000, 1), second, 1200, 8, seed=3)].reshape(-1, 8).mean(1)
    same_steps = a[150 : 150 + len(b)], b[: 500 - 150]
    assert np.corrcoef(*same_steps)[0, 1] > 0.9
    shifted = a[151 : 151 + len(b)], b[: 500 - 151]
    assert abs(np.corrcoef(*shifted)[0, 1]) < 0.3


def test_equal_lengths_leave_the_order_within_windows_random():
    shuffled = order(4000, 1)
    grouped = by_length(shuffled, np.ones(4000, int), 16, 16, 0)
    assert sorted(grouped) == sorted(shuffled) and (grouped != np.sort(grouped)).mean() > 0.9
    assert WINDOW * 16 < 4000


@pytest.mark.parametrize("num_rows", [1, 3, 16, 17])
def test_sets_of_a_step_or_less(num_rows):
    lengths = np.arange(num_rows)
    assert sorted(by_length(order(num_rows, 0), lengths, 0, 16, 0)) == list(range(num_rows))
