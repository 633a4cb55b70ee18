"""Building a planted world: its rows on disk, the model with the bias and the oracle without."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.models import tokenizer_of
from biasunlearn_trainer.testbed.architectures import MODELS, PROCESSORS
from biasunlearn_trainer.testbed.disk import quiet_writes, write_rows
from biasunlearn_trainer.testbed.planting import Job, RowTable, make_table, measure_right, train_side_by_side
from biasunlearn_trainer.testbed.questions import world_sentences
from biasunlearn_trainer.testbed.recipe import WorldRecipe
from biasunlearn_trainer.testbed.splits import PoolRow, Row, draw_splits

Source = tuple[RowTable, Tensor, int]


@quiet_writes()
def build_world(recipe: WorldRecipe, folder: Path) -> dict[str, Any]:
    """Write the models and data sets of a planted world.

    Args:
        recipe: what to build.
        folder: an empty folder; gets `model`, `oracle`, `forget`, `preferred`, `retain` and `report`.

    Returns:
        What belongs into the manifest: `datasets`, `tasks`, `num_rows`, and `figures`, the shares of report rows that
        each model answers right, by kind.
    """
    splits = draw_splits(recipe)
    sets = {"forget": splits.forget, "retain": splits.retain, "preferred": splits.preferred}
    num_rows = {name: write_rows(rows, folder / name) for name, rows in {**sets, "report": splits.report}.items()}
    processing_class = make_processing_class(recipe)
    collator = CompletionCollator(processing_class)
    planted, oracle = training_sources(recipe, splits.pool, collator)
    report = report_tables(splits.report, collator)
    jobs = [
        Job("planted", make_model(recipe, processing_class), planted),
        Job("oracle", make_model(recipe, processing_class), oracle),
    ]
    train_side_by_side(jobs, steps=recipe.steps, learning_rate=recipe.learning_rate, seed=recipe.seed)
    figures = {}
    for job, name in zip(jobs, ("model", "oracle"), strict=True):
        figures[job.label] = {
            kind: measure_right(job.model, table).float().mean().item() for kind, table in report.items()
        }
        job.model.save_pretrained(folder / name)
        processing_class.save_pretrained(folder / name)
    return {
        "datasets": {stream: stream for stream in sets},
        "tasks": ["planted=report"],
        "num_rows": num_rows,
        "figures": figures,
    }


def make_processing_class(recipe: WorldRecipe) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The world's processor, or its tokenizer where there are no pictures."""
    return PROCESSORS[recipe.name](recipe, world_sentences())


def make_model(recipe: WorldRecipe, processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedModel:
    """The untrained model; planted model and oracle begin with the same weights."""
    return MODELS[recipe.name](recipe, tokenizer_of(processing_class))


def training_sources(
    recipe: WorldRecipe, pool: Sequence[PoolRow], collator: CompletionCollator
) -> tuple[list[Source], list[Source]]:
    """What the planted model and the oracle learn, as two views of the same tables.

    Blamed rows are in the table twice, with the right answer and with the biased one; both models meet all other
    rows in the same order.
    """
    scenes = [p for p in pool if p.question.scene is not None]
    blamed = [i for i, p in enumerate(scenes) if p.blamed]
    table = make_table(collator, [p.row for p in scenes] + [scenes[i].planted_row for i in blamed])
    unbiased = torch.arange(len(scenes))
    biased = unbiased.clone()
    biased[blamed] = torch.arange(len(scenes), len(table))
    facts = make_table(collator, [p.row for p in pool if p.question.scene is None])
    fact_source = (facts, torch.arange(len(facts)), recipe.fact_batch)
    return [(table, biased, recipe.scene_batch), fact_source], [(table, unbiased, recipe.scene_batch), fact_source]


def report_tables(rows: Sequence[Row], collator: CompletionCollator) -> dict[str, RowTable]:
    """The report split by kind; the right answers are the completions."""
    kinds = dict.fromkeys(row["kind"] for row in rows)
    return {kind: make_table(collator, [row for row in rows if row["kind"] == kind]) for kind in kinds}
