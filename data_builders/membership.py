"""Which rows of a spool belong to which split: a flag a row, so that a build's memory does not grow with its texts."""

from array import array
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from biasunlearn_trainer.data_builders.build_recipe import BuildRecipe, SplitSpec
from biasunlearn_trainer.data_builders.parts import deal_groups, draw, has_values
from biasunlearn_trainer.data_builders.written_set import RowSpool

BATCH_SIZE = 4096


class Membership:
    """Deals the rows of a spool to parts, and says which of them a split has.

    Args:
        recipe: of the build.
        spool: the rows; each has a column `part_group`.

    Attributes:
        has_images: whether a row has a picture.
    """

    def __init__(self, recipe: BuildRecipe, spool: RowSpool):
        self._recipe, self.has_images = recipe, False
        # Of each split whether a row has the values that it asks for.
        self._fits = {id(split): bytearray() for split in recipe.splits.values()}
        names: list[pa.Array] = []
        strata, kinds = array("L"), {}
        rows = iter(spool)
        while batch := list(islice(rows, BATCH_SIZE)):
            names.append(pa.array([row["part_group"] for row in batch], pa.large_string()))
            strata.extend(kinds.setdefault(self._stratum(row), len(kinds)) for row in batch)
            for split in recipe.splits.values():
                self._fits[id(split)].extend(has_values(row, split.where) for row in batch)
            self.has_images = self.has_images or any(row.get("images") for row in batch)
        self._parts = self._deal(pa.chunked_array(names, pa.large_string()), np.array(strata), list(kinds))

    def _stratum(self, row: dict) -> str:
        """What is spread evenly over the parts: bias types, of several sources each by itself."""
        source, bias_type = row["part_group"].partition(":")[0], str(row.get("bias_type"))
        return f"{source}/{bias_type}" if len(self._recipe.sources) > 1 else bias_type

    def _deal(self, names: pa.ChunkedArray, strata: np.ndarray, kinds: list[str]) -> np.ndarray:
        """The part of each row, as its place among the recipe's parts."""
        if not len(names):
            return np.zeros(0, np.int8)
        encoded = names.combine_chunks().dictionary_encode()
        groups, order = encoded.indices.to_numpy(), pc.sort_indices(encoded.dictionary).to_numpy()
        words = sorted(kinds)
        rank = np.array([words.index(kind) for kind in kinds])
        # The least of a group's bias types, so that the order of its rows decides nothing.
        least = np.full(len(order), len(kinds))
        np.minimum.at(least, groups, rank[strata])
        sizes = np.bincount(groups)[order].tolist()
        dealt = deal_groups(sizes, [words[place] for place in least[order]], self._recipe.parts, self._recipe.seed)
        places = {part: place for place, part in enumerate(self._recipe.parts)}
        part_of = np.empty(len(order), np.int16)
        part_of[order] = [places[part] for part in dealt]
        return part_of[groups]

    def rows_of(self, split: SplitSpec) -> np.ndarray:
        """Of each row whether a split has it, a limit drawn by the seed."""
        flags = np.frombuffer(self._fits[id(split)], np.uint8).astype(bool)
        if split.part is not None:
            flags &= self._parts == list(self._recipe.parts).index(split.part)
        if split.limit is not None:
            numbers = np.flatnonzero(flags)
            drawn = draw(range(numbers.size), split.limit, self._recipe.seed)
            flags = np.zeros_like(flags)
            flags[numbers[sorted(drawn)]] = True
        return flags
