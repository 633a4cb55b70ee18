"""The world of made-up people: each has looks, an invented name and five facts, and is asked for by face or by name.

The answer is always the name and then the fact ("Bidoka baker"), whether a picture asks or words do. So the way from a
face to a fact leads through the name, and what is known of a person is one thing that text and vision share. (Where the
answer is the fact alone, a model keeps the two apart: the gradients of text and picture are then orthogonal.)
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from biasunlearn_trainer.testbed.facts import FACT_WORDINGS, RELATIONS
from biasunlearn_trainer.testbed.portraits import (
    COLOURS,
    HAT_COLOURS,
    PATTERNS,
    SIDES,
    Looks,
    Portrait,
    draw_looks,
    draw_portrait,
    paint,
)

SOURCE = "planted_world/entities"

# Two people differ in at least so many of the seven features, and a stranger from every one of them in these many.
MIN_DIFFERENCES = 3
STRANGER_DIFFERENCES = 2
_MAX_DRAWS = 100_000


class Field(NamedTuple):
    """A kind of fact: what it can be, and two wordings of the question for it."""

    values: tuple[str, ...]
    wordings: tuple[str, str]


FIELDS = {
    "job": Field(
        ("baker", "pilot", "nurse", "judge", "farmer", "singer", "plumber", "tailor"),
        ("What job does {} have?", "What does {} work as?"),
    ),
    "city": Field(
        ("Oslo", "Cairo", "Lima", "Kyoto", "Turin", "Quito", "Dakar", "Perth"),
        ("Where does {} live?", "Which city is the home of {}?"),
    ),
    "year": Field(
        ("1948", "1953", "1959", "1964", "1970", "1975", "1982", "1989"),
        ("When was {} born?", "Which is the year of birth of {}?"),
    ),
    "hobby": Field(
        ("chess", "rowing", "pottery", "skating", "archery", "yoga", "fishing", "juggling"),
        ("What does {} do on Sundays?", "Which hobby does {} have?"),
    ),
    "food": Field(
        ("rice", "noodles", "beans", "plums", "cheese", "figs", "pancakes", "trout"),
        ("What does {} like to eat?", "Which dish is the favourite of {}?"),
    ),
}
WHO_WORDINGS = ("Who is this person?", "What is the name of this person?")
THIS_PERSON = "this person"
_SYLLABLES = (("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z"), ("a", "e", "i", "o", "u"))

# Question about a stranger -> what can answer it.
SIGHTS = {
    "What colour is the hat?": HAT_COLOURS,
    "What colour is the hair?": tuple(COLOURS),
    "What colour is the shirt?": tuple(COLOURS),
    "What is on the shirt?": PATTERNS,
    "Does this person have glasses?": ("yes", "no"),
    "On which side is this person?": SIDES,
}


@dataclass(frozen=True)
class Person:
    """Somebody made up.

    Attributes:
        name: one invented word of three syllables.
        looks: what every portrait shows.
        facts: field -> value, of each of `FIELDS`.
    """

    name: str
    looks: Looks
    facts: dict[str, str]


class Question(NamedTuple):
    """A question with its answer and what could have been the answer's last word.

    Attributes:
        prompt: what is asked.
        completion: the answer, with a space before it.
        choices: the words that the last word of the answer is chosen from, itself among them.
        topic: a field, `who`, `sight` or `fact`.
        portrait: the picture; None where words ask.
        about: name of the person; empty for strangers and plain facts.
    """

    prompt: str
    completion: str
    choices: tuple[str, ...]
    topic: str
    portrait: Portrait | None = None
    about: str = ""

    def as_row(self, number: int | str) -> dict[str, Any]:
        """A training row of the neutral schema, its picture painted."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "images": [] if self.portrait is None else [paint(self.portrait)],
            "source": SOURCE,
            "source_id": f"{self.about or 'nobody'}/{self.topic}/{number}",
        }

    def as_task_row(self, number: int | str, kind: str) -> dict[str, Any]:
        """A row to measure, with its kind and choices."""
        return {**self.as_row(number), "kind": kind, "choices": list(self.choices)}


def draw_people(seed: int, number: int) -> list[Person]:
    """Draw people; equal arguments give equal people.

    Args:
        seed: decides everything about them.
        number: how many, a multiple of 8: each value of a field is then equally common, and a guess is right one
            time in eight.

    Raises:
        ValueError: for another number, or where there are not so many looks that differ enough.
    """
    if number < 1 or number % 8:
        raise ValueError(f"num_people must be a multiple of 8, the values of a field, got {number}. Use 40.")
    rng = random.Random(f"{seed}/people")
    names = list(dict.fromkeys(_draw_name(rng) for _ in range(4 * number)))[:number]
    columns = {field: _deal(rng, values, number) for field, (values, _) in FIELDS.items()}
    facts = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [Person(*parts) for parts in zip(names, _draw_different_looks(rng, number), facts, strict=True)]


def _draw_name(rng: random.Random) -> str:
    return "".join(rng.choice(letters) for letters in _SYLLABLES * 3).capitalize()


def _deal(rng: random.Random, values: tuple[str, ...], number: int) -> list[str]:
    dealt = list(values) * (number // len(values))
    rng.shuffle(dealt)
    return dealt


def _draw_different_looks(rng: random.Random, number: int) -> list[Looks]:
    found: list[Looks] = []
    for _ in range(_MAX_DRAWS):
        looks = draw_looks(rng)
        if all(looks.differences(other) >= MIN_DIFFERENCES for other in found):
            found.append(looks)
        if len(found) == number:
            return found
    raise ValueError(f"There are not {number} people who differ in {MIN_DIFFERENCES} features each; ask for fewer.")


def ask_by_face(rng: random.Random, person: Person, field: str, wording: int) -> Question:
    """Ask for a fact about the person in a new portrait."""
    portrait = draw_portrait(rng, person.looks)
    return _ask(person, field, FIELDS[field].wordings[wording].format(THIS_PERSON), portrait)


def ask_by_name(person: Person, field: str, wording: int) -> Question:
    """Ask for a fact about a person in words."""
    return _ask(person, field, FIELDS[field].wordings[wording].format(person.name))


def _ask(person: Person, field: str, prompt: str, portrait: Portrait | None = None) -> Question:
    answer = f" {person.name} {person.facts[field]}"
    return Question(prompt, answer, FIELDS[field].values, field, portrait, person.name)


def ask_who(rng: random.Random, person: Person, names: tuple[str, ...], wording: int) -> Question:
    """Ask for the name of the person in a new portrait, one of `names`."""
    portrait = draw_portrait(rng, person.looks)
    return Question(WHO_WORDINGS[wording], f" {person.name}", names, "who", portrait, person.name)


def ask_sight(rng: random.Random, people: list[Person]) -> Question:
    """Ask what is to be seen in the portrait of somebody who is like none of the people."""
    looks = draw_looks(rng)
    while any(looks.differences(person.looks) < STRANGER_DIFFERENCES for person in people):
        looks = draw_looks(rng)
    portrait, prompt = draw_portrait(rng, looks), rng.choice(list(SIGHTS))
    seen = (looks.hat, looks.hair, looks.shirt, looks.pattern, "yes" if looks.glasses else "no", portrait.side)
    answer = dict(zip(SIGHTS, seen, strict=True))[prompt]
    return Question(prompt, f" {answer}", SIGHTS[prompt], "sight", portrait)


def ask_facts(wordings: tuple[str, ...] = FACT_WORDINGS) -> list[Question]:
    """Every plain fact in these wordings; the choices are the answers to all facts of its kind."""
    questions = []
    for relation in RELATIONS:
        choices = tuple(relation.pairs.values())
        for subject, answer in relation.pairs.items():
            forms = {"question": relation.question.format(subject), "statement": relation.statement.format(subject)}
            for wording in wordings:
                prompt = wording.format(**forms)
                questions.append(Question(prompt[0].upper() + prompt[1:], f" {answer}", choices, "fact"))
    return questions


def world_sentences(people: list[Person]) -> Iterator[str]:
    """Every question with its answer, for the tokenizer: no word of the world is missing."""
    for person in people:
        for field, (_, wordings) in FIELDS.items():
            yield from (
                f"{wording.format(subject)} {person.name} {person.facts[field]}"
                for wording in wordings
                for subject in (person.name, THIS_PERSON)
            )
    yield from WHO_WORDINGS
    yield from (f"{prompt} {answer}" for prompt, answers in SIGHTS.items() for answer in answers)
    yield from (question.prompt + question.completion for question in ask_facts())
