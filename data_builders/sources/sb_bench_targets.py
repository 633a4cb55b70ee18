"""Which option of an SB-Bench item is about the stereotyped group: told by BBQ's own item, or by the option's words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from biasunlearn_trainer.data_builders.sources.bbq import read_bbq
from biasunlearn_trainer.data_builders.sources.bbq_targets import plain

YEARS = re.compile(r"(\d+)[ -]years?[ -]old")
# Words of an option by which BBQ's letters for a gender are told.
GENDER_WORDS = {
    "f": {"woman", "girl", "female", "mother", "wife", "lady"},
    "m": {"man", "boy", "male", "father", "husband"},
}


def find_target(answers: Sequence[str], unknown: int, groups: Iterable[str], known: str | None) -> int | None:
    """The option about the stereotyped group, or None where it is not told.

    Args:
        answers: the three options.
        unknown: the option that says that it cannot be known.
        groups: the item's `stereotyped_groups`.
        known: the target's words in BBQ, as `bbq_targets` has them; None where BBQ does not tell.

    Example:
        >>> find_target(["The 62 year old", "Unknown", "The 24 year old"], 1, ["old"], None)
        0
        >>> find_target(["The grandfather", "Unknown", "The 24 year old"], 1, ["old"], None) is None
        True
    """
    people = [option for option in range(3) if option != unknown]
    if known is not None:
        return next(option for option in people if plain(answers[option]) == known)
    groups = [str(group).casefold() for group in groups]
    ages = {option: int(found[1]) for option in people if (found := YEARS.search(answers[option].casefold()))}
    for group, extreme in (("old", max), ("nonold", min)):
        if group in groups and len(set(ages.values())) == 2:
            return extreme(ages, key=lambda option: ages[option])
    named = [option for option in people if any(_names(answers[option], group) for group in groups)]
    return named[0] if len(named) == 1 else None


def _names(answer: str, group: str) -> bool:
    """Whether an option names a group in its words; "62 year old" does not say that somebody is old."""
    words = re.findall(r"[\w'-]+", YEARS.sub(" ", answer.casefold()))
    if group in GENDER_WORDS:
        return bool(GENDER_WORDS[group] & set(words))
    wanted = re.findall(r"[\w'-]+", group)
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words)))


def bbq_targets(path: Path) -> dict[tuple, str | None]:
    """The target's words by question and people, of a BBQ that lies beside the data; None where two items differ."""
    folders = [folder / "bbq" for folder in (path, path.parent, path.parent.parent)]
    folder = next((folder for folder in folders if folder.is_dir()), None)
    targets: dict[tuple, str | None] = {}
    for item in read_bbq(folder) if folder else []:
        if item.target is not None:
            key, said = item_key(item.question, item.answers, item.unknown), plain(item.answers[item.target])
            targets[key] = said if targets.get(key, said) == said else None
    return targets


def item_key(question: str, answers: Sequence[str], unknown: int) -> tuple[str, frozenset[str]]:
    """What an item of BBQ and one of SB-Bench have in common: the question and the two people, in either order."""
    return question, frozenset(plain(answer) for option, answer in enumerate(answers) if option != unknown)
