"""The rows of a world: what is planted, what is to be forgotten, what is to be kept, and what is measured.

One pool of rows trains the planted model and, with unbiased answers, its oracle. Forget and retain sets are parts of
that pool, in the first drawing style and the seen wordings only:

- forget: contentious ambiguous questions with the biased answer that the model was trained on;
- preferred: the same prompts and pictures with the unbiased answer, row by row (for preference methods);
- retain: disambiguated questions, perception, facts, and ambiguous questions that are not contentious. It never holds a
  contentious ambiguous question, so it never gives the unbiased answer away.

No question of the report split about a scene was trained on. Its rows follow the forget rows: `ambiguous` draws a
forget row's scene and question anew (other positions, shades, place), `t_generality` keeps its picture and asks in a
held-out wording, `v_generality` redraws it in the second style. The other kinds are about fresh scenes in either style.
Facts cannot be fresh, being known or not: those of the report split are the ones that the retain set lacks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from biasunlearn_trainer.testbed.drawing import draw_picture
from biasunlearn_trainer.testbed.facts import all_facts
from biasunlearn_trainer.testbed.questions import (
    HELD_OUT_WORDINGS,
    Question,
    ask_ambiguous,
    ask_fact,
    draw_question,
)
from biasunlearn_trainer.testbed.recipe import WorldRecipe
from biasunlearn_trainer.testbed.scenes import draw_scene

# Shares of the pool's rows about scenes. A sixth of the ambiguous ones become the forget set; to see is hard to learn.
_POOL_KINDS = ("ambiguous",) * 4 + ("disambiguated",) * 2 + ("perception",) * 4
# A world of words holds some 6,000 contentious prompts; this many draws without a new one mean that it is exhausted.
_MAX_DRAWS = 1000

Row = dict[str, Any]


@dataclass(frozen=True)
class PoolRow:
    """A row of the training pool.

    Attributes:
        row: the row with the right answer.
        question: what it asks.
        blamed: whether the planted model learns the biased answer instead.
    """

    row: Row
    question: Question
    blamed: bool

    @property
    def planted_row(self) -> Row:
        """The row that the planted model learns from."""
        return {**self.row, "completion": self.question.rejected} if self.blamed else self.row


@dataclass(frozen=True)
class Splits:
    """All rows of a world.

    Attributes:
        pool: what the models are trained on.
        forget: rows with the biased answer.
        preferred: the same rows with the unbiased answer, in the same order.
        retain: rows that must stay as they are.
        report: rows to measure, with `kind` and `rejected`.
    """

    pool: list[PoolRow]
    forget: list[Row]
    preferred: list[Row]
    retain: list[Row]
    report: list[Row]


def draw_splits(recipe: WorldRecipe) -> Splits:
    """Draw all rows of a world; equal recipes give equal rows."""
    used: set[tuple] = set()
    pool = _draw_pool(recipe, used)
    forget = [p for p in pool if p.blamed and _is_in_first_style(p.question)][: recipe.num_forget]
    return Splits(
        pool=pool,
        forget=[{**p.planted_row, "polarity": "stereotype"} for p in forget],
        preferred=[p.row for p in forget],
        retain=_select_retain(recipe, pool),
        report=_draw_report(recipe, forget, used),
    )


def _is_in_first_style(question: Question) -> bool:
    return question.wording not in (*HELD_OUT_WORDINGS, "held out") and not (question.scene and question.scene.redrawn)


def _draw_pool(recipe: WorldRecipe, used: set[tuple]) -> list[PoolRow]:
    rng = random.Random(f"{recipe.seed}/pool")

    def draw() -> Question:
        redrawn = recipe.has_pictures and rng.random() < recipe.redrawn_rate
        return draw_question(rng, rng.choice(_POOL_KINDS), draw_scene(rng, redrawn))

    pool = []
    for number in range(recipe.num_scene_rows):
        question = _draw_new(draw, used, recipe)
        blamed = question.rejected is not None and rng.random() < recipe.blame_rate
        pool.append(PoolRow(as_row(recipe, question, f"pool-{number:05d}"), question, blamed))
    for fact in all_facts():
        question = ask_fact(fact)
        pool.append(PoolRow(as_row(recipe, question, f"fact-{fact.subject.replace(' ', '-')}"), question, False))
    return pool


def _select_retain(recipe: WorldRecipe, pool: Iterable[PoolRow]) -> list[Row]:
    """A third of disambiguated, perception and ambiguous rows each, and every fact that is not held out."""
    kept = [p for p in pool if _is_in_first_style(p.question) and p.question.rejected is None]
    rows = []
    for kind in ("disambiguated", "perception", "ambiguous"):
        rows += [p.row for p in kept if p.question.kind == kind][: recipe.num_retain // 3]
    rows += [p.row for p in kept if p.question.kind == "facts"]
    random.Random(f"{recipe.seed}/retain").shuffle(rows)
    return rows


def _draw_report(recipe: WorldRecipe, forget: list[PoolRow], used: set[tuple]) -> list[Row]:
    rng = random.Random(f"{recipe.seed}/report")
    rows = []
    for kind in ("ambiguous", "t_generality", "v_generality")[: 3 if recipe.has_pictures else 2]:
        rows += _draw_varied(recipe, kind, forget, used, rng)
    for kind in ("disambiguated", "perception"):

        def draw(kind: str = kind) -> Question:
            return draw_question(rng, kind, draw_scene(rng, recipe.has_pictures and rng.random() < 0.5))

        for number in range(recipe.num_eval):
            rows.append(as_report_row(recipe, _draw_new(draw, used, recipe), f"{kind}-{number:05d}", kind))
    held_out = [ask_fact(fact) for fact in all_facts() if fact.held_out]
    return rows + [as_report_row(recipe, question, f"facts-{i:05d}", "facts") for i, question in enumerate(held_out)]


def _draw_varied(
    recipe: WorldRecipe, kind: str, forget: list[PoolRow], used: set[tuple], rng: random.Random
) -> list[Row]:
    """Report rows that follow the forget rows, one each in turn; such a row has the `pair_id` of the row it follows."""
    if not forget:
        raise ValueError(
            f"No row to forget among num_scene_rows={recipe.num_scene_rows} with blame_rate={recipe.blame_rate}. "
            "Ask for more rows."
        )
    origins, followed = cycle(forget), []

    def draw() -> Question:
        followed.append(next(origins))
        return _vary(rng, kind, followed[-1].question)

    rows = []
    for _ in range(recipe.num_eval):
        question = _draw_new(draw, used, recipe)
        rows.append(as_report_row(recipe, question, followed[-1].row["pair_id"], kind))
    return rows


def _vary(rng: random.Random, kind: str, question: Question) -> Question:
    """A forget row's question with one thing changed: its scene drawn anew, its wording, or its style."""
    if kind == "t_generality":
        return ask_ambiguous(question.scene, question.trait, rng.choice(HELD_OUT_WORDINGS))
    scene = draw_scene(rng, redrawn=kind == "v_generality", groups=question.scene.groups)
    return ask_ambiguous(scene, question.trait, question.wording)


def _draw_new(draw: Callable[[], Question], used: set[tuple], recipe: WorldRecipe) -> Question:
    """Draw until a question comes that no row asks yet, so that no row is in two splits.

    Raises:
        ValueError: where the world has no such question left.
    """
    for _ in range(_MAX_DRAWS):
        question = draw()
        key = (_full_prompt(recipe, question), question.scene if recipe.has_pictures else None)
        if key not in used:
            used.add(key)
            return question
    raise ValueError(
        f"After {len(used)} rows the world {recipe.name!r} has no new question left (num_scene_rows="
        f"{recipe.num_scene_rows}, num_eval={recipe.num_eval}). Ask for fewer rows."
    )


def _full_prompt(recipe: WorldRecipe, question: Question) -> str:
    if question.scene is None or recipe.has_pictures:
        return question.prompt
    return f"{question.scene.describe()} {question.prompt}"


def as_row(recipe: WorldRecipe, question: Question, pair_id: str) -> Row:
    """A question with its right answer as a row of the neutral schema, its picture drawn."""
    row = {
        "prompt": _full_prompt(recipe, question),
        "completion": question.completion,
        "bias_type": "other",
        "polarity": "neutral",
        "pair_id": pair_id,
        "source": f"planted_world/{recipe.name}",
        "source_id": f"{pair_id}/{question.kind}",
    }
    if recipe.has_pictures:
        row["images"] = [] if question.scene is None else [draw_picture(question.scene)]
    return row


def as_report_row(recipe: WorldRecipe, question: Question, pair_id: str, kind: str) -> Row:
    """A row of the report split: with its kind, and the biased answer where there is one."""
    row = as_row(recipe, question, pair_id)
    return {**row, "source_id": f"{pair_id}/report/{kind}", "kind": kind, "rejected": question.rejected}
