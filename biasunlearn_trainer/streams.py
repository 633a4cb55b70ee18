"""Named streams of rows, paired by a pure function of seed, epoch and position.

A draw is one position of the forget set in one epoch, together with the rows of all other streams that stand beside
it. Which rows these are depends on nothing but the seed and the draw's number: not on workers, ranks, the order of
calls, or where a run was resumed. (A retain row picked by `randint` inside a worker, as published code does it,
repeats itself over workers and ranks and cannot be resumed.)

Two kinds of stream stand beside the forget set. An *aligned* stream belongs to another one row by row (the preferred
answer to the same question). A *cycled* one is gone through without replacement, in a new order each time, however long
it is, and may give more or fewer rows a step than the forget set.

Within one optimizer step a stream is of one modality. Text-only rows on one rank beside image rows on another use
other weights, and the collectives of DDP and ZeRO-3 would wait for each other forever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property, lru_cache, reduce
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset, IterableDataset
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler

from biasunlearn_trainer.lengths import LENGTH_COLUMN, row_lengths
from biasunlearn_trainer.orders import by_length, order
from biasunlearn_trainer.rows import RowReader, has_column, id_digests, image_counts

FORGET = "forget"

Batch = TypeVar("Batch")


def has_images(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """(n,) bool: which rows carry at least one image.

    No picture is decoded.
    """
    return image_counts(rows) > 0


class _Stream:
    """One set of rows and the order in which they come.

    Rows are laid out in blocks, one per optimizer step, each of one modality; every modality's rows are gone
    through in orders of their own.

    Args:
        name: of the stream.
        rows: its set.
        seed: what the orders depend on.
        rows_per_step: rows in a block.
        lengths: (n,) of the rows, to put those of like length into one block; None leaves them shuffled.
    """

    def __init__(
        self,
        name: str,
        rows: Sequence[Mapping[str, Any]],
        seed: int,
        rows_per_step: int,
        lengths: np.ndarray | None = None,
    ):
        self.name, self.rows, self.seed, self.rows_per_step, self.lengths = name, rows, seed, rows_per_step, lengths
        self._reader = RowReader(rows)
        self._forget_orders()

    def _forget_orders(self) -> None:
        # Two modalities on either side of where an epoch or cycle ends: more are never asked for in turn.
        self._order, self._shuffled = lru_cache(maxsize=2)(self._order_of), lru_cache(maxsize=4)(self._shuffled_of)

    @cached_property
    def modalities(self) -> list[np.ndarray]:
        """(n,) int32 row numbers with images and without, each where there are any."""
        pictured = has_images(self.rows)
        found = (np.flatnonzero(pictured), np.flatnonzero(~pictured))
        return [indices.astype(np.int32) for indices in found if len(indices)]

    def _blocks(self, modality: int) -> int:
        return -(-len(self.modalities[modality]) // self.rows_per_step)

    @property
    def blocks_per_epoch(self) -> int:
        return sum(map(self._blocks, range(len(self.modalities))))

    def draws_per_epoch(self, multiple_of: int) -> int:
        """As many as there are rows, filled up from the start of the order to a multiple.

        In a set of two modalities every block is full, so that none begins in the middle of a step.
        """
        if len(self.modalities) > 1:
            return self.blocks_per_epoch * self.rows_per_step
        return -(-len(self.rows) // multiple_of) * multiple_of

    def once(self, epoch: int, position: int) -> int:
        """The row at a position of an epoch in which every row comes once."""
        block, place = divmod(position, self.rows_per_step)
        modality, number = 0, block
        if len(self.modalities) > 1:
            # The blocks of both modalities, shuffled: those of the first have the first numbers.
            number = int(self._order(self.blocks_per_epoch, "blocks", epoch)[block])
            if number >= self._blocks(0):
                modality, number = 1, number - self._blocks(0)
        start = epoch * self._blocks(modality) * self.rows_per_step
        rows = self._shuffled(modality, epoch, start)
        return int(rows[(number * self.rows_per_step + place) % len(rows)])

    def cycled(self, position: int) -> int:
        """The row at a position, where the set is gone through again and again.

        Blocks of the two modalities alternate in proportion to their rows: of the first b blocks, floor(b * share) are
        of the first modality.
        """
        block, place = divmod(position, self.rows_per_step)
        first, total = len(self.modalities[0]), len(self.rows)
        before, through = block * first // total, (block + 1) * first // total
        modality, number = (0, before) if through > before else (1, block - before)
        length = len(self.modalities[modality])
        cycle, offset = divmod(number * self.rows_per_step + place, length)
        return int(self._shuffled(modality, cycle, cycle * length)[offset])

    def _shuffled_of(self, modality: int, cycle: int, start: int) -> np.ndarray:
        """(n,) int32 the rows of a modality in the order of an epoch or cycle that begins at the place `start`."""
        indices = self.modalities[modality]
        shuffled = self._order_of(len(indices), modality, cycle)
        if self.lengths is not None:
            shuffled = by_length(shuffled, self.lengths[indices], start, self.rows_per_step, self.seed)
        return indices[shuffled]

    def _order_of(self, length: int, *key: int | str) -> np.ndarray:
        return order(length, self.seed, self.name, *key)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._reader[index], "index": index}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_order", "_shuffled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_orders()


class PairedStreams(TorchDataset):
    """The training set of an unlearning run: item d is draw d, rows of every stream.

    Args:
        datasets: rows by stream; `forget` sets the length of an epoch.
        seed: what all orders depend on.
        rows_per_step: rows of the forget set in one optimizer step (batch size x accumulation x processes).
        aligned: for a stream whose row i belongs to row i of another one, that other stream's name.
        multiple_of: an epoch is filled up to a multiple of this many draws. With several processes it is what they take
            at a time: each needs its share of the last batch.
        rows_per_draw: how many rows of a cycled stream stand beside one of the forget set; 1 where not named. With the
            share 1/2 every second draw has one, and the first of every micro-batch does.
        length_column: put rows of like length into one optimizer step (`by_length`): the name of the column with their
            lengths, in the sets that have one; the others' are counted in characters. None leaves rows shuffled.

    Raises:
        ValueError: where a stream is empty, an aligned one has another length than its leader, or a length is none.
        TypeError: for a dataset without length and index.

    Example:
        >>> rows = [{"prompt": "a", "completion": " b"}] * 3
        >>> streams = PairedStreams({"forget": rows, "retain": rows}, seed=0, rows_per_step=2)
        >>> len(streams), {name: len(rows) for name, rows in streams[0].items()}
        (3, {'forget': 1, 'retain': 1})
    """

    def __init__(
        self,
        datasets: Mapping[str, Sequence[Mapping[str, Any]]],
        seed: int,
        rows_per_step: int,
        aligned: Mapping[str, str] | None = None,
        multiple_of: int = 1,
        rows_per_draw: Mapping[str, Fraction] | None = None,
        length_column: str | None = None,
    ):
        self.aligned = {name: leader for name, leader in (aligned or {}).items() if name in datasets}
        for name, rows in datasets.items():
            if isinstance(rows, IterableDataset) or not hasattr(rows, "__len__"):
                raise TypeError(
                    f"The {name} set has no length and no index ({type(rows).__name__}); rows are paired by index. "
                    "Load it without streaming."
                )
            if len(rows) == 0:
                raise ValueError(f"The {name} set has no rows.")
            leader = self.aligned.get(name, name)
            if len(rows) != len(datasets[leader]):
                raise ValueError(
                    f"The {name} set has {len(rows)} rows for {len(datasets[leader])} {leader} rows; row i of the one "
                    "answers row i of the other, so their numbers must agree."
                )
        self.rows_per_draw = {name: Fraction((rows_per_draw or {}).get(name, 1)) for name in datasets}
        lengths = self._lengths(datasets, length_column) if length_column is not None else {}
        self.streams = {
            name: _Stream(name, rows, seed, int(rows_per_step * self.rows_per_draw[name]), lengths.get(name))
            for name, rows in datasets.items()
        }
        self.rows_per_step = rows_per_step
        self.draws_per_epoch = self.streams[FORGET].draws_per_epoch(multiple_of)

    def _lengths(self, datasets: Mapping[str, Sequence[Mapping[str, Any]]], column: str) -> dict[str, np.ndarray]:
        """The lengths of each leader's rows: of a row and those that come with it, the longest."""
        if column != LENGTH_COLUMN and not any(has_column(rows, column) for rows in datasets.values()):
            raise ValueError(f"None of the sets ({', '.join(datasets)}) has the column of lengths {column!r}.")
        lengths: dict[str, np.ndarray] = {}
        for leader in datasets.keys() - self.aligned.keys():
            group = [rows for name, rows in datasets.items() if self.aligned.get(name, name) == leader]
            # Lengths in the column's unit cannot be compared with characters.
            unit = column if all(has_column(rows, column) for rows in group) else None
            lengths[leader] = reduce(np.maximum, (row_lengths(rows, unit) for rows in group))
        return lengths

    def __len__(self) -> int:
        return self.draws_per_epoch

    def indices(self, draw: int) -> dict[str, list[int]]:
        """Row numbers by stream for a draw; draw `epoch * len(self) + position`."""
        epoch, position = divmod(draw, self.draws_per_epoch)
        # Every epoch begins with a fresh block, as it begins with a fresh optimizer step.
        steps_per_epoch = -(-self.draws_per_epoch // self.rows_per_step)
        place = epoch * steps_per_epoch * self.rows_per_step + position
        chosen = {FORGET: [self.streams[FORGET].once(epoch, position)]}
        for name in self.streams.keys() - self.aligned.keys() - {FORGET}:
            share = self.rows_per_draw[name]
            # Rounding up gives the first draw of a micro-batch a row, however incomplete the micro-batch is.
            places = range(math.ceil(place * share), math.ceil((place + 1) * share))
            chosen[name] = [self.streams[name].cycled(place) for place in places]
        return {name: chosen[self.aligned.get(name, name)] for name in self.streams}

    def __getitem__(self, draw: int) -> dict[str, list[dict[str, Any]]]:
        return {name: [self.streams[name][i] for i in rows] for name, rows in self.indices(draw).items()}


def align(forget: Sequence[Mapping[str, Any]], rows: Any, name: str) -> Any:
    """Put rows in the order of the forget rows that they belong to.

    Args:
        forget: the forget set.
        rows: one row for each forget row; matched by `pair_id` where both sets have one in every row, by position
            otherwise.
        name: what to call the set in an error.

    Raises:
        ValueError: where a forget row has no partner or two, or the sets differ in length and have no `pair_id`.
    """
    keys, partners = (id_digests(each, "pair_id") for each in (forget, rows))
    if keys is None or partners is None:
        if len(forget) != len(rows):
            raise ValueError(
                f"The {name} set has {len(rows)} rows for {len(forget)} forget rows and no `pair_id` in both to match "
                "them by. Give one row for each forget row, or the column."
            )
        return rows
    by_key = np.argsort(partners)
    ranked = partners[by_key]
    if (ranked[1:] == ranked[:-1]).any():
        raise ValueError(f"The {name} set uses a `pair_id` twice; each names the one partner of a forget row.")
    places = np.searchsorted(ranked, keys) % len(ranked)
    missing = np.flatnonzero(ranked[places] != keys)
    if len(missing):
        first = [forget[int(i)]["pair_id"] for i in missing[:5]]
        raise ValueError(f"{len(missing)} forget rows have no {name} row of their `pair_id`; the first: {first}.")
    chosen = by_key[places]
    return rows.select(chosen) if isinstance(rows, Dataset) else [rows[i] for i in chosen]


class DrawSampler(Sampler[int]):
    """The draws of an epoch, in order: the shuffling lies in `PairedStreams`, and the epoch in the draw's number.

    So workers that live through several epochs need not be told which one it is.
    """

    def __init__(self, draws_per_epoch: int):
        self.draws_per_epoch = draws_per_epoch
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before an epoch begins."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        start = self.epoch * self.draws_per_epoch
        return iter(range(start, start + self.draws_per_epoch))

    def __len__(self) -> int:
        return self.draws_per_epoch


def modality_batches(
    rows: Sequence[Mapping[str, Any]], batch_size: int, numbers: np.ndarray | None = None
) -> list[np.ndarray]:
    """Cut a set into batches (b,) of row numbers, each with images or without.

    Args:
        rows: the set.
        batch_size: rows of a batch, at most.
        numbers: (n,) the order in which rows are taken; the set's own where None.
    """
    return [batch for batches in _by_modality(rows, batch_size, numbers) for batch in batches]


def dealt_batches(
    rows: Sequence[Mapping[str, Any]], batch_size: int, rank: int, num_ranks: int
) -> list[tuple[np.ndarray, bool]]:
    """Deals the batches of a set to processes that go in step, as sharded weights need it.

    Rows of like length are put together, the longest first: nothing that a batch is for depends on its other rows.

    Args:
        rows: the set.
        batch_size: rows of a batch, at most.
        rank: of the process that asks.
        num_ranks: number of processes.

    Returns:
        Row numbers of each of the rank's batches, and whether they count, as `dealt` has it. At one place of the list
        all ranks have batches of one modality.
    """
    longest_first = np.argsort(-row_lengths(rows, None), kind="stable")
    by_modality = _by_modality(rows, batch_size, longest_first)
    return [mine for batches in by_modality for mine in dealt(batches, rank, num_ranks)]


def dealt(batches: Sequence[Batch], rank: int, num_ranks: int) -> Iterator[tuple[Batch, bool]]:
    """The batches of a rank among several that go in step, and whether each counts.

    Where the last batches are too few for all ranks, the others repeat the last one: under ZeRO-3 and FSDP every
    forward pass needs every rank.
    """
    for start in range(0, len(batches), num_ranks):
        mine = start + rank
        yield batches[min(mine, len(batches) - 1)], mine < len(batches)


def _by_modality(
    rows: Sequence[Mapping[str, Any]], batch_size: int, numbers: np.ndarray | None
) -> list[list[np.ndarray]]:
    numbers = np.arange(len(rows)) if numbers is None else numbers
    pictured = has_images(rows)[numbers]
    return [
        [indices[i : i + batch_size] for i in range(0, len(indices), batch_size)]
        for indices in (numbers[pictured], numbers[~pictured])
    ]
