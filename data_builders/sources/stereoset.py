"""StereoSet (Nadeem, Bethke and Reddy 2021): items, splits by target term, and rows to train on or to score.

items = read_stereoset("stereoset/")
parts = split_by_target(items, {"train": 0.5, "probe": 0.2, "report": 0.3}, seed=0)
forget = to_rows(parts["train"], "stereotype")
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.sources.stereoset_format import (
    SENTENCE_POLARITIES,
    StereoSetItem,
    read_stereoset,
    unknown_name,
    write_json,
)

__all__ = [
    "SENTENCE_POLARITIES",
    "StereoSetItem",
    "check_disjoint",
    "read_stereoset",
    "split_by_target",
    "to_rows",
    "write_json",
]


def split_by_target(
    items: Sequence[StereoSetItem], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[StereoSetItem]]:
    """Split so that no target term is in two parts, each bias type in the given proportions.

    Args:
        items: what to split.
        fractions: share of the items by part, adding up to 1, for instance {"train": 0.5, "probe": 0.2, "report": 0.3}.
        seed: draws which term goes where.

    Returns:
        The items of each part, in their given order. Terms are whole, so the shares are met as nearly as they allow.

    Raises:
        ValueError: where the fractions are not positive or do not add up to 1, or a part gets no term.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"Fractions must be positive and add up to 1, got {dict(fractions)}.")
    sizes = Counter(_term(item) for item in items)
    bias_types = {_term(item): item.bias_type for item in items}
    part_of: dict[str, str] = {}
    for bias_type in sorted(set(bias_types.values())):
        terms = sorted(term for term in sizes if bias_types[term] == bias_type)
        random.Random(f"{seed}/{bias_type}").shuffle(terms)
        total = sum(sizes[term] for term in terms)
        lacking = {part: fraction * total for part, fraction in fractions.items()}
        for term in terms:
            part = max(lacking, key=lacking.get)
            part_of[term] = part
            lacking[part] -= sizes[term]
    parts = {part: [item for item in items if part_of[_term(item)] == part] for part in fractions}
    empty = [part for part, members in parts.items() if not members]
    if empty:
        raise ValueError(f"No target term is left for {', '.join(empty)}: {len(sizes)} terms for {len(parts)} parts.")
    check_disjoint(parts)
    return parts


def check_disjoint(parts: Mapping[str, Sequence[StereoSetItem]]) -> None:
    """Raise a ValueError that lists what two parts share: target terms (whatever their case), or sentences."""
    seen: dict[tuple, str] = {}
    shared = set()
    for part, items in parts.items():
        for item in items:
            text = (item.task, item.context, item.stereotype)
            for key, shown in ((("term", _term(item)), f"target {item.target!r}"), (text, f"sentence {text[2]!r}")):
                if seen.setdefault(key, part) != part:
                    shared.add(f"{shown} is in {seen[key]} and in {part}")
    if shared:
        raise ValueError("The parts are not disjoint:\n  " + "\n  ".join(sorted(shared)))


def to_rows(items: Iterable[StereoSetItem], which: str | Sequence[str] = SENTENCE_POLARITIES) -> list[dict[str, Any]]:
    """Rows in the schema's columns, ready to train on or to score.

    Args:
        items: of either task.
        which: polarity or polarities to take of each item: `stereotype`, `anti_stereotype`, `unrelated`.

    Returns:
        Item by item, polarity by polarity. Intrasentence: an empty prompt and the sentence; intersentence: the
        context, and the sentence after a space. `pair_id` joins the sentences of an item.

    Raises:
        ValueError: for an unknown polarity, with the nearest known one.
    """
    polarities = (which,) if isinstance(which, str) else tuple(which)
    for polarity in polarities:
        if polarity not in SENTENCE_POLARITIES:
            raise ValueError(unknown_name("polarity", polarity, SENTENCE_POLARITIES))
    return [_row(item, polarity) for item in items for polarity in polarities]


def _term(item: StereoSetItem) -> str:
    return item.target.casefold().strip()


def _row(item: StereoSetItem, polarity: str) -> dict[str, Any]:
    sentence = getattr(item, polarity)
    inside = item.task == "intrasentence"
    return {
        "prompt": "" if inside else item.context,
        "completion": sentence if inside else " " + sentence,
        "bias_type": item.bias_type,
        "polarity": polarity,
        "pair_id": f"stereoset-{item.id}",
        "source": "stereoset",
        "source_id": item.id,
    }
