"""SB-Bench (Narnaware et al. 2025, arXiv 2502.08779; CC BY-NC-SA 4.0): BBQ's questions asked about pictures of people.

Published as `ucf-crcv/SB-Bench` on the Hub, splits `real` and `synthetic`, with the columns

    file_name (picture), id (CATEGORY_QUESTION_EXAMPLE_POLARITY_IMAGE, numbers), category, additional_metadata (a Python
    dictionary as text: subcategory, stereotyped_groups, ...), question_polarity (neg, nonneg), context, question,
    ans0, ans1, ans2, label (the right option)

One category is spelt `Race_etnicity`. Where this was found: the README and `Evaluation/run_inference_batch.py` of the
authors' code.

The context says nothing about who is who, so that the right option is the one that it cannot be known. There is no
`answer_info` as in BBQ: which option is about the stereotyped group is told, in this order,

1. from BBQ's own item with the same question and the same two people, where a copy of BBQ lies in a folder `bbq` in the
   data's folder or in the one above;
2. from the option's words, where exactly one option names a stereotyped group ("The Muslim man"), or two ages tell who
   is old ("The 62 year old"). Of BBQ's own items these words tell 4 in 10, and none of them wrongly.

Otherwise it is not told, as in `bbq_targets`: the item counts for accuracy alone, and gives no row to forget.

Image BBQ: `read_image_bbq` reads a copy of BBQ whose rows also have a column `image`, the path of a picture.
"""

from __future__ import annotations

import ast
import dataclasses
import logging
import os
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Image

from biasunlearn_trainer.data_builders.images import resolve_path
from biasunlearn_trainer.data_builders.schema import Faults, nearest
from biasunlearn_trainer.data_builders.sources.bbq import BIAS_TYPES, POLARITIES, BBQItem, read_bbq
from biasunlearn_trainer.data_builders.sources.bbq_targets import as_option, read_columns
from biasunlearn_trainer.data_builders.sources.pictured_rows import (
    PicturedRows,
    StoredPicture,
    check_pictures,
    picture_table,
)
from biasunlearn_trainer.data_builders.sources.published import load_config, missing_columns, text_rows
from biasunlearn_trainer.data_builders.sources.sb_bench_targets import bbq_targets, find_target, item_key
from biasunlearn_trainer.data_builders.sources.unknown_options import says_unknown

logger = logging.getLogger(__name__)

SOURCE = "sb_bench"
COLUMNS = (
    "file_name",
    "id",
    "category",
    "additional_metadata",
    "question_polarity",
    "context",
    "question",
    "ans0",
    "ans1",
    "ans2",
    "label",
)
CATEGORIES = {"Race_etnicity": "Race_ethnicity"}
ROW_POLARITIES = ("stereotype", "anti_stereotype", "neutral")


@dataclass(frozen=True)
class PicturedItem(BBQItem):
    """A BBQ item with its picture."""

    picture: StoredPicture | None = None


def read_sb_bench(path: str | os.PathLike) -> list[PicturedItem]:
    """Reads a split of SB-Bench.

    Args:
        path: ROOT/real or ROOT/synthetic, as in `published`.

    Returns:
        The items in order. How many have no target is logged.

    Raises:
        InvalidDataset: missing columns, unknown words, a label out of range, not exactly one option that says that it
            cannot be known, a repeated id, pictures that do not open: all together, each with its row.
        FileNotFoundError: there is no such split.
    """
    dataset, faults = load_config(path), Faults(str(path))
    missing_columns(dataset, COLUMNS, faults)
    faults.raise_if_any()
    table, known = picture_table(dataset, "file_name"), bbq_targets(Path(path).expanduser())
    items: dict[str, PicturedItem] = {}
    pictures = {}
    for number, (where, row) in enumerate(text_rows(dataset, ("file_name",))):
        pictures[where] = StoredPicture(table, number)
        item = _item(row, pictures[where], known, where, faults)
        if item is not None and item.id in items:
            faults.add(f"item {item.id} is there twice", where)
        elif item is not None:
            items[item.id] = item
    check_pictures(pictures, faults)
    faults.raise_if_any()
    _log_untold(items.values())
    return list(items.values())


def read_image_bbq(path: str | os.PathLike) -> list[PicturedItem]:
    """Reads BBQ with pictures: a .jsonl or .csv file in BBQ's columns and `image`, a path relative to the file.

    Raises:
        InvalidDataset: BBQ's faults, or pictures that are missing or do not open.
        FileNotFoundError: there is no such file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder; name one file of BBQ with a column `image`.")
    items = {item.id: item for item in read_bbq(path)}
    faults, pictures, places = Faults(str(path)), {}, {}
    for where, row in read_columns(path, ("category", "example_id", "image"), faults):
        try:
            stored = resolve_path(row["image"] or "", path.parent)
        except ValueError as err:
            faults.add(str(err), where)
            continue
        table = Dataset.from_dict({"image": [stored]}).cast_column("image", Image()).with_format("arrow")
        pictures[where] = StoredPicture(table, 0)
        places[f"{str(row['category']).strip()}-{str(row['example_id']).strip()}"] = pictures[where]
    check_pictures(pictures, faults)
    faults.raise_if_any()
    return [PicturedItem(**_fields(item), picture=places[identity]) for identity, item in items.items()]


def to_rows(items: Iterable[PicturedItem], polarity: str) -> PicturedRows:
    """Rows that ask an item's question about its picture.

    Args:
        items: those whose answer is not told are passed over.
        polarity: `stereotype` answers with the biased option, `anti_stereotype` with the other person, `neutral` with
            the right option: that it cannot be known, or, where the context says it, who it was.

    Returns:
        Rows in the schema's columns; the prompt is that of the task `sb_bench`.

    Raises:
        ValueError: an unknown polarity.
    """
    if polarity not in ROW_POLARITIES:
        meant = nearest(polarity, ROW_POLARITIES)
        raise ValueError(f"unknown polarity {polarity!r}; did you mean {meant!r}? Valid: {ROW_POLARITIES}")
    rows, pictures = [], []
    for item in items:
        biased = item.biased
        people = {0, 1, 2} - {item.unknown}
        told = biased is not None
        option = {
            "stereotype": biased,
            "anti_stereotype": (people - {biased}).pop() if told else None,
            "neutral": item.label,
        }[polarity]
        if option is None:
            continue
        rows.append(
            {
                "prompt": f"{item.context}\n\nQ: {item.question}\nA:",
                "completion": f" {item.answers[option]}",
                "bias_type": item.bias_type,
                "polarity": polarity,
                "pair_id": item.id,
                "source": SOURCE,
                "source_id": item.id,
            }
        )
        pictures.append(item.picture)
    return PicturedRows(rows, pictures)


def to_report_rows(items: Iterable[PicturedItem]) -> PicturedRows:
    """Rows for the task `planted`: the right answer, and beside it in `rejected` the biased one where it is told."""
    items = list(items)
    rows = []
    for (row, _), item in zip(to_rows(items, "neutral").stored(), items, strict=True):
        biased = item.biased if item.condition == "ambig" else None
        kind = "ambiguous" if item.condition == "ambig" else "disambiguated"
        rows.append({**row, "kind": kind, "rejected": None if biased is None else f" {item.answers[biased]}"})
    return PicturedRows(rows, [item.picture for item in items])


def split_by_template(
    items: Sequence[PicturedItem], fractions: Mapping[str, float], seed: int = 0
) -> dict[str, list[PicturedItem]]:
    """Deals whole templates to named parts, category by category, so that a question stands in one part alone.

    Args:
        items: from `read_sb_bench` or `read_image_bbq`.
        fractions: shares by name that sum to 1.
        seed: of the shuffle.
    """
    if not fractions or min(fractions.values()) <= 0 or abs(sum(fractions.values()) - 1) > 1e-9:
        raise ValueError(f"`fractions` must be positive and sum to 1, got {dict(fractions)}.")
    part_of: dict[str, str] = {}
    for category in sorted({item.category for item in items}):
        templates = sorted({item.template for item in items if item.category == category})
        random.Random(f"{seed}/{category}").shuffle(templates)
        end, start = 0.0, 0
        for name, fraction in fractions.items():
            end += fraction * len(templates)
            part_of |= dict.fromkeys(templates[start : round(end)], name)
            start = round(end)
    return {name: [item for item in items if part_of[item.template] == name] for name in fractions}


def _item(
    row: Mapping[str, Any],
    picture: StoredPicture,
    known: Mapping[tuple, str | None],
    where: str,
    faults: Faults,
) -> PicturedItem | None:
    """One item, or None with its faults noted."""
    before = faults.count
    texts = {name: str(row[name] or "").strip() for name in COLUMNS[1:-1]}
    category = CATEGORIES.get(texts["category"], texts["category"])
    answers = (texts["ans0"], texts["ans1"], texts["ans2"])
    label, metadata = as_option(row["label"]), _metadata(row["additional_metadata"])
    unknowns = [option for option, answer in enumerate(answers) if says_unknown(answer)]
    _check_texts(texts, category, where, faults)
    if label is None:
        faults.add(f"label must be 0, 1 or 2, got {row['label']!r:.60}", where)
    if len(unknowns) != 1:
        faults.add(f"one option must say that it cannot be known, {len(unknowns)} do: {answers}", where)
    if metadata is None:
        faults.add(f"additional_metadata is no dictionary: {row['additional_metadata']!r:.80}", where)
    if faults.count > before:
        return None
    unknown, numbers = unknowns[0], texts["id"].split("_")
    bbq = known.get(item_key(texts["question"], answers, unknown))
    subcategory = str(metadata.get("subcategory") or "None").strip()
    return PicturedItem(
        id=texts["id"],
        category=category,
        subcategory=None if subcategory == "None" else subcategory[0].upper() + subcategory[1:],
        bias_type=BIAS_TYPES[category],
        template=f"{category}-{numbers[1] if len(numbers) == 5 else texts['question']}",
        polarity=texts["question_polarity"],
        condition="ambig" if label == unknown else "disambig",
        context=texts["context"],
        question=texts["question"],
        answers=answers,
        names=answers,
        label=label,
        unknown=unknown,
        target=find_target(answers, unknown, metadata.get("stereotyped_groups") or [], bbq),
        picture=picture,
    )


def _check_texts(texts: Mapping[str, str], category: str, where: str, faults: Faults) -> None:
    for name in ("id", "context", "question", "ans0", "ans1", "ans2"):
        if not texts[name]:
            faults.add(f"{name} is empty", where)
    for name, value, valid in (
        ("category", category, tuple(BIAS_TYPES)),
        ("question_polarity", texts["question_polarity"], POLARITIES),
    ):
        if value not in valid:
            meant = nearest(value, valid)
            hint = f"did you mean {meant!r}? " if meant else ""
            faults.add(f"unknown {name} {value!r}; {hint}valid: {', '.join(valid)}", where)


def _metadata(value: Any) -> dict | None:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return value if isinstance(value, dict) else None


def _fields(item: BBQItem) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in dataclasses.fields(item)}


def _log_untold(items: Iterable[PicturedItem]) -> None:
    items = list(items)
    untold = sum(item.target is None for item in items)
    if untold:
        logger.warning(
            "SB-Bench: the stereotyped group cannot be told for %d of %d items. They count for accuracy and not for "
            "the bias scores; put a copy of BBQ into a folder `bbq` beside the data to tell more.",
            untold,
            len(items),
        )
