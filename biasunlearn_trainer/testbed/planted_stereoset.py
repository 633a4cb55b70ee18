"""Real stereotypes in a small language model: StereoSet's sentences trained in, WikiText-2 to keep its language.

Here the bias is memorised item by item, so that forgetting it on some target terms says little about others: the
split by target term shows how far unlearning reaches.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.data_builders.sources.stereoset import (
    StereoSetItem,
    read_stereoset,
    split_by_target,
    to_rows,
    write_json,
)
from biasunlearn_trainer.testbed.architectures import make_llama, train_tokenizer
from biasunlearn_trainer.testbed.disk import quiet_writes, write_rows
from biasunlearn_trainer.testbed.planting import Job, RowTable, make_table, train_side_by_side
from biasunlearn_trainer.testbed.recipe import StereoSetRecipe

ITEMS_FILE = Path("stereoset") / "intrasentence_stereo_set.csv"
TEXT_FILE = Path("wikitext2") / "valid.txt.gz"
_MIN_WORDS = 8  # headings and scraps of markup are shorter


def find_stereoset(data_dir: str | os.PathLike | None = None) -> Path:
    """The folder that holds `stereoset` and `wikitext2`.

    Args:
        data_dir: the folder; None for the environment variable BIASUNLEARN_DATA.

    Raises:
        FileNotFoundError: where no folder is named, or a file is missing in it.
    """
    named = data_dir or os.environ.get("BIASUNLEARN_DATA")
    if not named:
        raise FileNotFoundError(
            "The testbed `stereoset` is made from real data. Set BIASUNLEARN_DATA to the folder that holds "
            f"{ITEMS_FILE} and {TEXT_FILE}."
        )
    folder = Path(named).expanduser().resolve()
    missing = [str(file) for file in (ITEMS_FILE, TEXT_FILE) if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}. Point BIASUNLEARN_DATA at the folder with both."
        )
    return folder


@quiet_writes()
def build_stereoset(recipe: StereoSetRecipe, data: Path, folder: Path) -> dict[str, Any]:
    """Write the model, the sets and the splits.

    Args:
        recipe: what to build.
        data: the folder that `find_stereoset` found.
        folder: an empty folder; gets `model`, `forget`, `retain`, and the splits `train.json`, `probe.json` and
            `report.json` in StereoSet's own layout.

    Returns:
        What belongs into the manifest: `datasets`, `tasks`, `num_rows`, `data_sha256`, and `figures`, the share of
        items of each split whose stereotype the model finds likelier per token than the anti-stereotype.
    """
    items = read_stereoset(data / ITEMS_FILE)
    fractions = {"train": recipe.train_fraction, "probe": recipe.probe_fraction}
    fractions["report"] = 1.0 - sum(fractions.values())
    parts = split_by_target(items, fractions, recipe.seed)
    for name, part in parts.items():
        write_json(part, folder / f"{name}.json")
    sets = {"forget": to_rows(parts["train"], "stereotype"), "retain": to_rows(parts["train"], "anti_stereotype")}
    num_rows = {name: write_rows(rows, folder / name) for name, rows in sets.items()}
    passages = read_passages(data / TEXT_FILE, recipe.passage_words, recipe.seed)
    model, tokenizer, tables = _plant(recipe, items, passages)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    preferred = {item.id: bool(choice) for item, choice in zip(items, _prefers_stereotype(model, tables), strict=True)}
    return {
        "datasets": {stream: stream for stream in sets},
        "tasks": [f"stereoset@{name}={name}.json" for name in parts],
        "num_rows": num_rows,
        "data_sha256": {
            str(file): hashlib.sha256((data / file).read_bytes()).hexdigest() for file in (ITEMS_FILE, TEXT_FILE)
        },
        "figures": {
            "planted": {name: sum(preferred[i.id] for i in part) / len(part) for name, part in parts.items()},
        },
    }


def read_passages(path: Path, num_words: int, seed: int) -> list[dict[str, str]]:
    """Passages of at most `num_words` words, one from every paragraph of a gzipped text, as rows without a prompt."""
    rng = random.Random(f"{seed}/passages")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        paragraphs = [line.split() for line in file]
    rows = []
    for words in paragraphs:
        if len(words) > _MIN_WORDS:
            start = rng.randrange(max(1, len(words) - num_words // 2))
            rows.append({"prompt": "", "completion": " ".join(words[start : start + num_words])})
    return rows


def _plant(
    recipe: StereoSetRecipe, items: Sequence[StereoSetItem], passages: Sequence[Mapping[str, str]]
) -> tuple[Any, Any, dict[str, RowTable]]:
    """Train the model; returns it with its tokenizer and the tables of stereotypes and anti-stereotypes."""
    sentences = {which: to_rows(items, which) for which in ("stereotype", "anti_stereotype")}
    corpus = [row["completion"] for rows in (*sentences.values(), passages) for row in rows]
    tokenizer = train_tokenizer(corpus, recipe.vocab_size)
    model = make_llama(tokenizer, recipe.language_model, recipe.seed, tied=True)
    # A sentence is scored without an end of text, so none is trained.
    collator = CompletionCollator(tokenizer, max_length=recipe.language_model.max_positions, append_eos=False)
    tables = {which: make_table(collator, rows) for which, rows in sentences.items()}
    text = make_table(collator, passages)
    num_stereotypes = round(recipe.stereotype_rate * recipe.item_batch)
    sources = [
        (tables["stereotype"], torch.arange(len(items)), num_stereotypes),
        (tables["anti_stereotype"], torch.arange(len(items)), recipe.item_batch - num_stereotypes),
        (text, torch.arange(len(text)), recipe.text_batch),
    ]
    job = Job("stereoset", model, sources)
    train_side_by_side([job], steps=recipe.steps, learning_rate=recipe.learning_rate, seed=recipe.seed)
    return model, tokenizer, tables


@torch.no_grad()
def _prefers_stereotype(model: Any, tables: Mapping[str, RowTable]) -> torch.Tensor:
    """(N,) bool: whether the stereotype has the higher mean log-probability per token."""
    means = {}
    for which, table in tables.items():
        outputs = [forward_completions(model, table.take(index)) for index in torch.arange(len(table)).split(128)]
        means[which] = torch.cat([output.logps / output.lengths for output in outputs])
    return means["stereotype"] > means["anti_stereotype"]
