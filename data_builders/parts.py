"""Which part of a built set a group of rows belongs to: whole groups, each bias type in the given shares."""

import heapq
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.store import digest


def deal_groups(sizes: Sequence[int], strata: Sequence[Any], fractions: Mapping[str, float], seed: int) -> list[str]:
    """Deals groups to parts so that each stratum has the shares, as nearly as whole groups allow.

    Args:
        sizes: rows of each group, the groups in the order of their names.
        strata: what is to be spread evenly, of each group (its bias type).
        fractions: share by part, positive, summing to 1.
        seed: of the order in which groups are dealt.

    Returns:
        The part of each group; the same whatever the order of the rows.

    >>> sorted(deal_groups([1, 1], ["age", "age"], {"x": 0.5, "y": 0.5}, 0))
    ['x', 'y']
    """
    members: dict[str, list[int]] = {}
    for group, stratum in enumerate(strata):
        members.setdefault(str(stratum), []).append(group)
    part_of = [""] * len(sizes)
    for stratum, groups in sorted(members.items()):
        random.Random(f"{seed}/{stratum}").shuffle(groups)
        total = sum(sizes[group] for group in groups)
        lacking = {part: fraction * total for part, fraction in fractions.items()}
        for group in groups:
            part = max(lacking, key=lacking.get)
            part_of[group] = part
            lacking[part] -= sizes[group]
    return part_of


def has_values(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Whether a row has one of the wanted values in every column that `where` names."""
    return all(
        row.get(column) in wanted if isinstance(wanted, list) else row.get(column) == wanted
        for column, wanted in where.items()
    )


def draw(numbers: Iterable[int], limit: int, seed: int) -> set[int]:
    """Draws `limit` of the numbers; which ones depends on the seed and on nothing else."""
    return set(heapq.nsmallest(limit, numbers, key=lambda number: digest([seed, number])))


def count_by(rows: Iterable[Mapping[str, Any]], column: str) -> dict[str, int]:
    """Rows by the values of a column, the commonest first; without a value they count as "none"."""
    return dict(Counter(str(row.get(column) or "none") for row in rows).most_common())
