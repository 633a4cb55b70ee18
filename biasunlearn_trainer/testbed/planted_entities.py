"""Building the world of made-up people: the model that knows them, and the rows of every forget split."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.testbed.architectures import make_llava, make_processor, train_tokenizer
from biasunlearn_trainer.testbed.disk import quiet_writes, write_rows
from biasunlearn_trainer.testbed.entities import (
    FIELDS,
    Person,
    Question,
    ask_by_face,
    ask_by_name,
    ask_facts,
    ask_sight,
    ask_who,
    draw_people,
    world_sentences,
)
from biasunlearn_trainer.testbed.entity_splits import (
    MEASURED,
    NUM_WORDINGS,
    ForgetSplit,
    draw_forget_splits,
    measured_rows,
    training_sets,
)
from biasunlearn_trainer.testbed.planting import Job, RowTable, make_table, measure_right, train_side_by_side
from biasunlearn_trainer.testbed.recipe import EntitiesRecipe

SPLITS_FOLDER = "splits"

Source = tuple[RowTable, Tensor, int]


@quiet_writes()
def build_entities(recipe: EntitiesRecipe, folder: Path) -> dict[str, Any]:
    """Write the model that knows everybody, and the sets of each split.

    Args:
        recipe: what to build.
        folder: an empty folder; gets `model` and, for each split, `splits/NAME` with its sets.

    Returns:
        What belongs into the manifest: `splits`, for each its `datasets`, `tasks` and `num_rows`; `people`, who is
        forgotten in which split; the first split's `datasets` and `tasks` as the testbed's own; and `figures`, the
        shares of the first split's rows that the model answers right word for word, by kind.
    """
    people = draw_people(recipe.seed, recipe.num_people)
    splits = draw_forget_splits(recipe, people)
    written = {split.name: _write_split(recipe, split, people, folder) for split in splits}
    processor = make_processor(train_tokenizer(world_sentences(people)), recipe.vision_model)
    model = make_llava(processor.tokenizer, recipe.language_model, recipe.vision_model, recipe.seed)
    job = Job("people", model, training_sources(recipe, people, CompletionCollator(processor)))
    train_side_by_side(
        [job],
        steps=recipe.steps,
        learning_rate=recipe.learning_rate,
        seed=recipe.seed,
        label_smoothing=recipe.label_smoothing,
    )
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    default = splits[0].name
    return {
        "datasets": written[default]["datasets"],
        "tasks": written[default]["tasks"],
        "num_rows": written[default]["num_rows"],
        "default_split": default,
        "splits": written,
        "people": {split.name: [person.name for person in split.forget] for split in splits},
        "figures": {
            f"{default}@{part}": _measure(model, processor, measured_rows(recipe, splits[0], people, part))
            for part in MEASURED
        },
    }


def _write_split(recipe: EntitiesRecipe, split: ForgetSplit, people: list[Person], folder: Path) -> dict[str, Any]:
    """Write the sets of a split; returns its entry of the manifest."""
    place = f"{SPLITS_FOLDER}/{split.name}"
    sets = training_sets(recipe, split)
    measured = {part: measured_rows(recipe, split, people, part) for part in MEASURED}
    num_rows = {name: write_rows(rows, folder / place / name) for name, rows in {**sets, **measured}.items()}
    return {
        "datasets": {name: f"{place}/{name}" for name in sets},
        "tasks": [f"entities@{part}={place}/{part}" for part in MEASURED],
        "num_rows": num_rows,
    }


def training_sources(recipe: EntitiesRecipe, people: list[Person], collator: CompletionCollator) -> list[Source]:
    """What the model learns: everybody by face and by name, strangers' portraits, and plain facts."""
    seen = _draw_seen(recipe, people)
    told = [
        ask_by_name(person, field, wording) for person in people for field in FIELDS for wording in range(NUM_WORDINGS)
    ]
    facts = ask_facts()
    # One table and one forward pass for all that has no picture; a question by name comes as much oftener as wanted.
    words = make_table(collator, [question.as_row(number) for number, question in enumerate(told + facts)])
    repeats = round(recipe.name_share / (1 - recipe.name_share) * len(facts) / len(told))
    by_name = torch.arange(len(told)).repeat(max(1, repeats))
    pictures = make_table(collator, [question.as_row(number) for number, question in enumerate(seen)])
    return [
        (pictures, torch.arange(len(pictures)), recipe.picture_batch),
        (words, torch.cat([by_name, torch.arange(len(told), len(words))]), recipe.text_batch),
    ]


def _draw_seen(recipe: EntitiesRecipe, people: list[Person]) -> list[Question]:
    """Questions with a picture, no picture twice: of ten, six for a fact by face, one for a name, three for a sight."""
    rng = random.Random(f"{recipe.seed}/pool")
    names, fields = tuple(person.name for person in people), list(FIELDS)
    questions = []
    for number in range(recipe.num_pictures):
        person, wording = rng.choice(people), rng.randrange(NUM_WORDINGS)
        if number % 10 < 6:
            questions.append(ask_by_face(rng, person, rng.choice(fields), wording))
        elif number % 10 < 7:
            questions.append(ask_who(rng, person, names, wording))
        else:
            questions.append(ask_sight(rng, people))
    return questions


def _measure(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, rows: Sequence[dict[str, Any]]
) -> dict[str, float]:
    collator = CompletionCollator(processor)
    kinds = dict.fromkeys(row["kind"] for row in rows)
    tables = {kind: make_table(collator, [row for row in rows if row["kind"] == kind]) for kind in kinds}
    return {kind: measure_right(model, table).float().mean().item() for kind, table in tables.items()}
