"""From rows that came through the stages to a written set: splits, checks between them, Parquet, card."""

import dataclasses
import errno
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np

from biasunlearn_trainer.data_builders.build_recipe import BuildRecipe, SplitSpec
from biasunlearn_trainer.data_builders.card import BuildReport, SplitReport, write_card
from biasunlearn_trainer.data_builders.contact_sheet import draw_contact_sheet
from biasunlearn_trainer.data_builders.leakage import check_leakage
from biasunlearn_trainer.data_builders.membership import Membership
from biasunlearn_trainer.data_builders.near_duplicates import NearDuplicates, row_text
from biasunlearn_trainer.data_builders.parts import has_values
from biasunlearn_trainer.data_builders.sources.stereoset_format import StereoSetItem, write_json
from biasunlearn_trainer.data_builders.stages import Reject
from biasunlearn_trainer.data_builders.store import digest
from biasunlearn_trainer.data_builders.written_set import RowSpool, features_of, write_parquet

DATA_FOLDER, CARD, REJECTS, REPORT, SHEET = "data", "README.md", "rejects.jsonl", "build.json", "contact_sheet.png"
SHEET_ROWS = 16
NUM_SHOWN = 5
INDEXED_ROWS = 100_000
"""Rows to report that are compared at a time with those to train on: what bounds that check to some 30 MB."""


class BuildError(RuntimeError):
    """A build that cannot be finished; what its stages were answered is kept."""


def split_kind(name: str, split: SplitSpec) -> str:
    """What a split is for: as it says, or told from its name; `test` and `validation` are the Hub's words."""
    told = {"report": "report", "test": "report", "probe": "probe", "validation": "probe"}
    return split.kind or told.get(name, "train")


class Assembly:
    """Splits of one spool of rows, on their way to a folder.

    Args:
        recipe: of the build.
        spool: the rows; each has a column `part_group`.
        folder: where the files are written before they are moved to their place.
        on_reject: called for rows that are left out here.
        report: filled in.
    """

    def __init__(self, recipe: BuildRecipe, spool: RowSpool, folder: Path, on_reject, report: BuildReport):
        self.spool, self.folder, self.report = spool, folder, report
        self.on_reject = on_reject
        membership = Membership(recipe, spool)
        self.has_images = membership.has_images
        # Of each split a flag a row, and nothing else of the rows, is held in memory.
        self.members = {name: membership.rows_of(split) for name, split in recipe.splits.items()}
        splits = {n: split for n, split in recipe.splits.items() if not split.optional or self.members[n].any()}
        self.recipe = dataclasses.replace(recipe, splits=splits)
        self.files = {name: f"{DATA_FOLDER}/{name}.parquet" for name in splits}

    def rows(self, name: str) -> Iterator[dict]:
        """The rows of a split, without those that a check dropped."""
        return self.spool.chosen(self.members[name].tobytes())

    def _by_kind(self) -> tuple[list[str], list[str]]:
        kinds = {name: split_kind(name, split) for name, split in self.recipe.splits.items()}
        return [n for n in kinds if kinds[n] == "train"], [n for n in kinds if kinds[n] != "train"]

    def check_duplicates(self) -> None:
        """Finds rows that a split has twice, and rows to train on that are nearly rows to report."""
        keys = np.fromiter(map(_text_key, self.spool), np.uint64, self.spool.num_rows)
        for name in self.recipe.splits:
            numbers = np.flatnonzero(self.members[name])
            first = np.zeros(numbers.size, bool)
            first[np.unique(keys[numbers], return_index=True)[1]] = True
            self._duplicates(name, numbers[~first])
        trained, held_out = self._by_kind()
        for name, other in itertools.product(trained, held_out):
            self._near(name, other)

    def _duplicates(self, name: str, numbers: np.ndarray) -> None:
        if not numbers.size:
            return
        if not self.recipe.drop_duplicates:
            self.report.duplicates[name] = numbers.size
            return
        for row in self._drop(name, numbers):
            self.on_reject(Reject(row, "duplicate", f"twice in {name}", "splits"))

    def _drop(self, name: str, numbers: Iterable[int]) -> Iterator[dict]:
        """Takes rows out of a split, and yields them in order."""
        dropped = np.zeros(self.spool.num_rows, bool)
        dropped[list(numbers)] = True
        self.members[name] &= ~dropped
        return self.spool.chosen(dropped.tobytes())

    def _near(self, name: str, other: str) -> None:
        found: dict[int, float] = {}
        numbers = np.flatnonzero(self.members[name])
        reported = self.rows(other)
        while len(index := NearDuplicates(islice(reported, INDEXED_ROWS), self.recipe.near_duplicate_similarity)):
            for number, near in zip(numbers.tolist(), index.search(self.rows(name)), strict=True):
                if near is not None:
                    found.setdefault(number, near.similarity)
            if len(index) < INDEXED_ROWS:
                break
            del index  # before the next is made
        self.report.near_duplicates[f"{name} and {other}"] = len(found)
        action = self.recipe.on_near_duplicate
        if found and action == "raise":
            flags = np.isin(np.arange(self.spool.num_rows), list(found)[:NUM_SHOWN]).tolist()
            rows = zip(sorted(list(found)[:NUM_SHOWN]), self.spool.chosen(flags), strict=True)
            shown = [f"  - {found[number]:.2f}: {row_text(row)!r:.160}" for number, row in rows]
            raise BuildError(
                f"{len(found)} row(s) of {name} are nearly rows of {other}; set `on_near_duplicate: drop` to leave "
                "them out, or `part_by` to a column that keeps them together:\n" + "\n".join(shown)
            )
        if action == "drop":
            for number, row in zip(sorted(found), self._drop(name, found), strict=True):
                detail = f"of a row of {other}, similarity {found[number]:.2f}"
                self.on_reject(Reject(row, "near duplicate", detail, "splits"))

    def write(self) -> None:
        """Writes Parquet files, formats of benchmarks, and the contact sheet."""
        (self.folder / DATA_FOLDER).mkdir(parents=True, exist_ok=True)
        schema = self.spool.schema
        features = features_of(schema, self.has_images)
        for name, split in self.recipe.splits.items():
            counts = {"bias_type": Counter(), "polarity": Counter()}
            num, print_ = write_parquet(_counted(self.rows(name), counts), self.folder / self.files[name], features)
            if not num:
                raise BuildError(f"split {name} has no row: {_why_empty(split, self.spool)}")
            orders = [dict(sorted(count.items())) for count in counts.values()]
            self.report.splits[name] = SplitReport(num, print_, *orders)
            if split.write_as == "stereoset_json":
                write_json(_stereoset_items(self.rows(name)), self.folder / DATA_FOLDER / f"{name}.json")
        if self.has_images:
            pictured = (row for name in self.recipe.splits for row in islice(self._pictured(name), 4))
            counts = sum((Counter(split.bias_types) for split in self.report.splits.values()), Counter())
            draw_contact_sheet(islice(pictured, SHEET_ROWS), self.folder / SHEET, counts=counts)

    def _pictured(self, name: str) -> Iterator[dict]:
        return (row for row in self.rows(name) if row.get("images"))

    def check_leakage(self) -> None:
        """Compares each split to train on with those to report and probe; raises or lists."""
        trained, held_out = self._by_kind()
        for name, other in itertools.product(trained, held_out):
            # In a set of these names the rejected answer counts, too: a forget row is a question's biased answer.
            kind = split_kind(other, self.recipe.splits[other])
            pair = {"trained": _Rows(self, name), kind: _Rows(self, other)}
            leaks = check_leakage(pair, on_leak=self.recipe.on_leak, pairs=[("trained", kind)])
            self.report.leaks[f"{name} and {other}"] = len(leaks)

    def write_card(self) -> None:
        """Writes the card beside the files."""
        (self.folder / CARD).write_text(write_card(self.report, self.files), encoding="utf-8")


class _Rows:
    """The rows of a split, read anew each time that they are gone through."""

    def __init__(self, assembly: Assembly, name: str):
        self._assembly, self._name = assembly, name

    def __iter__(self) -> Iterator[dict]:
        return self._assembly.rows(self._name)


def _text_key(row: Mapping) -> int:
    """64 bits of a row's words, however they are written, and its pictures."""
    return int(digest([row_text(row).casefold().split(), row["prompt"] == "", row.get("images")])[:16], 16)


def _counted(rows: Iterable[dict], counts: Mapping[str, Counter]) -> Iterator[dict]:
    for row in rows:
        for column, count in counts.items():
            count[str(row.get(column) or "none")] += 1
        yield row


def _why_empty(split: SplitSpec, rows: Iterable[dict]) -> str:
    """Names the first condition that no row meets, with the values that there are."""
    for column, wanted in split.where.items():
        values = Counter(str(row.get(column)) for row in rows)
        if not any(has_values({column: value}, {column: wanted}) for value in values):
            there = ", ".join(value for value, _ in values.most_common(12))
            return f"none has {column} {wanted!r}; values there: {there}."
    return f"part {split.part!r} has none with {split.where}." if split.where else f"part {split.part!r} is empty."


def _stereoset_items(rows: Iterable[dict]) -> Iterator[StereoSetItem]:
    """Puts the sentences of an item together again; an item that lost one is left out."""
    items: dict[str, dict[str, dict]] = {}
    for row in rows:
        items.setdefault(row["pair_id"], {})[row["polarity"]] = row
    for sentences in items.values():
        if set(sentences) != {"stereotype", "anti_stereotype", "unrelated"}:
            continue
        first = sentences["stereotype"]
        texts = {polarity: row["completion"].strip() for polarity, row in sentences.items()}
        own = {name: first[name] for name in ("target", "bias_type", "task", "context")}
        yield StereoSetItem(id=first["source_id"], **own, **texts)


def move_into_place(partial: Path, folder: Path) -> None:
    """Moves the finished files over older ones, the card last."""
    names = sorted((p.relative_to(partial) for p in partial.rglob("*") if p.is_file()), key=lambda p: p.name == CARD)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / name, folder / name)
    shutil.rmtree(partial)


def disk_error(err: OSError, recipe: BuildRecipe) -> BuildError:
    """The same in a sentence that says what is kept and what to do."""
    full = err.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    what = "the set cannot be written: the disk is full" if full else f"the build cannot go on: {err.strerror or err}"
    where = f" ({err.filename})" if err.filename else ""
    remedy = "make room" if full else "mend that"
    return BuildError(
        f"{what}{where}. What stages were answered is kept in {recipe.cache_dir}; {remedy} "
        "and run the same command again, it continues there."
    )


def reject_line(reject: Reject) -> str:
    """One line of rejects.jsonl."""
    row = reject.row
    if row.get("images"):
        row = {
            **row,
            "images": [os.path.basename(image) if isinstance(image, str) else None for image in row["images"]],
        }
    line = {"stage": reject.stage, "reason": reject.reason, "detail": reject.detail, "row": row}
    if reject.attempts > 1:
        line["attempts"] = reject.attempts
    return json.dumps(line, ensure_ascii=False) + "\n"
