"""Who is to be forgotten, and the rows of each such split: what is trained on, and what is measured.

A split names some of the people, C_f; the rest are C_r. It is drawn from its own number, and the model knows nothing
of it, so one model serves every split. Its sets, in MMUnlearner's terms:

- forget: questions by face about C_f (the paper's T);
- retain: questions by face about C_r;
- preserve: the paper's P, equation 6: by name about C_f, by face about C_r, by name about C_r;
- forget_qa, retain_qa: the parts of it that ask by name.

`validation` and `report` measure the same things on two further drawings of everybody. Words cannot be drawn anew:
questions by name and plain facts are the same in both.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from biasunlearn_trainer.testbed.entities import (
    FIELDS,
    Person,
    Question,
    ask_by_face,
    ask_by_name,
    ask_facts,
    ask_sight,
    ask_who,
)
from biasunlearn_trainer.testbed.facts import FACT_WORDINGS
from biasunlearn_trainer.testbed.recipe import EntitiesRecipe

NUM_WORDINGS = 2
MEASURED = ("validation", "report")

Row = dict[str, Any]


@dataclass(frozen=True)
class ForgetSplit:
    """Some of the people are to be forgotten.

    Attributes:
        name: `forgetPP_N`: percent of the people, number of the draw.
        forget: who is to be forgotten.
        retain: everybody else.
    """

    name: str
    forget: list[Person]
    retain: list[Person]


def draw_forget_splits(recipe: EntitiesRecipe, people: list[Person]) -> list[ForgetSplit]:
    """Draw every split of a recipe.

    Raises:
        ValueError: for a percentage that is no whole number of people, at least one and not all.
    """
    splits = []
    for percent, number in product(recipe.forget_percents, range(recipe.num_splits)):
        count, rest = divmod(percent * len(people), 100)
        if rest or not 0 < count < len(people):
            raise ValueError(
                f"forget_percents: {percent} % of {len(people)} people is no number of people between 1 and "
                f"{len(people) - 1}. Use a multiple of {100 / len(people):g}."
            )
        name = f"forget{percent:02d}_{number}"
        chosen = set(random.Random(f"{recipe.seed}/{name}").sample(range(len(people)), count))
        forget = [person for i, person in enumerate(people) if i in chosen]
        splits.append(ForgetSplit(name, forget, [person for i, person in enumerate(people) if i not in chosen]))
    return splits


def training_sets(recipe: EntitiesRecipe, split: ForgetSplit) -> dict[str, list[Row]]:
    """The rows that unlearning may use, by set."""
    rng = random.Random(f"{recipe.seed}/{split.name}/training")
    drawings = max(1, recipe.num_forget // (len(split.forget) * len(FIELDS) * NUM_WORDINGS))
    forget = [ask_by_face(rng, *asked) for asked in _every_question(split.forget) for _ in range(drawings)]
    retain = [_ask_in_any_wording(rng, person, field) for person, field in product(split.retain, FIELDS)]
    more = [
        _ask_in_any_wording(rng, person, field)
        for _ in range(recipe.retain_drawings - 1)
        for person, field in product(split.retain, FIELDS)
    ]
    forget_qa = [ask_by_name(*asked) for asked in _every_question(split.forget)]
    retain_qa = [ask_by_name(*asked) for asked in _every_question(split.retain)]
    sets = {
        "forget": forget,
        "retain": retain + more,
        # One question a fact in each part, so that the three parts weigh as much as they have facts.
        "preserve": _one_wording_each(rng, forget_qa) + retain + _one_wording_each(rng, retain_qa),
        "forget_qa": forget_qa,
        "retain_qa": retain_qa,
    }
    return {name: _shuffled_rows(rng, questions) for name, questions in sets.items()}


def measured_rows(recipe: EntitiesRecipe, split: ForgetSplit, people: list[Person], part: str) -> list[Row]:
    """The rows of the task `entities`, by kind.

    Args:
        recipe: how many rows.
        split: who is to be forgotten.
        people: everybody.
        part: `validation` or `report`; decides how everybody is drawn.
    """
    rng = random.Random(f"{recipe.seed}/{split.name}/{part}")
    names = tuple(person.name for person in people)
    drawings = max(2, 8 // len(split.forget))
    kinds: dict[str, list[Question]] = {
        "forget_vqa": [ask_by_face(rng, *asked) for asked in _every_question(split.forget) for _ in range(drawings)],
        "forget_qa": [ask_by_name(*asked) for asked in _every_question(split.forget)],
        "forget_who": _ask_who(rng, split.forget, names, 2 * drawings),
        "retain_vqa": [_ask_in_any_wording(rng, *asked) for asked in product(split.retain, FIELDS)],
        "retain_qa": [ask_by_name(*asked) for asked in _every_question(split.retain)],
        "retain_who": _ask_who(rng, split.retain, names, 1),
        "real_vqa": [ask_sight(rng, people) for _ in range(recipe.num_sights)],
        "real_qa": ask_facts(FACT_WORDINGS[:1]),
    }
    return [
        question.as_task_row(f"{part}/{number}", kind)
        for kind, questions in kinds.items()
        for number, question in enumerate(questions)
    ]


def _every_question(people: list[Person]) -> Iterator[tuple[Person, str, int]]:
    return product(people, FIELDS, range(NUM_WORDINGS))


def _ask_in_any_wording(rng: random.Random, person: Person, field: str) -> Question:
    return ask_by_face(rng, person, field, rng.randrange(NUM_WORDINGS))


def _ask_who(rng: random.Random, people: list[Person], names: tuple[str, ...], drawings: int) -> list[Question]:
    asked = product(people, range(NUM_WORDINGS), range(drawings))
    return [ask_who(rng, person, names, wording) for person, wording, _ in asked]


def _one_wording_each(rng: random.Random, questions: list[Question]) -> list[Question]:
    """Of the wordings of each question, which stand one after the other, one."""
    pairs = range(0, len(questions), NUM_WORDINGS)
    return [questions[first + rng.randrange(NUM_WORDINGS)] for first in pairs]


def _shuffled_rows(rng: random.Random, questions: list[Question]) -> list[Row]:
    rows = [question.as_row(number) for number, question in enumerate(questions)]
    rng.shuffle(rows)
    return rows
