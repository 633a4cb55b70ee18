"""A sentence with its groups exchanged, or the reason why it is left alone."""

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from biasunlearn_trainer.data_builders.counterfactual.grammar import role_of_her, role_of_his, word_class_of
from biasunlearn_trainer.data_builders.counterfactual.terms import Refused, Term, find_terms
from biasunlearn_trainer.data_builders.counterfactual.tokens import Sentence, article, cased_like
from biasunlearn_trainer.data_builders.counterfactual.words import Concept, Table, table

REASONS = {
    "no_term": "no word of the bias type's table is in it",
    "no_counterpart": "a word has none in the other group",
    "mixed_groups": "it names more than two groups, or both in one breath, so that the exchange would say the same",
    "ambiguous_her": 'what "her" or "his" is cannot be told from its neighbours',
    "word_class": "a word is noun or adjective, and the other group has two words for it",
    "named_person": "it may speak of one particular person",
    "unknown_name": "a name whose gender the lists do not know",
    "other_sense": "a word may have another sense, or does not certainly describe a person",
    "quoted_term": "it speaks of the word itself",
    "compound": "a word is part of a compound that is no word of the table",
    "bound_word": "another word of it is true of one group only",
    "odd_case": 'a word is written in no usual case ("hE", "muslim")',
    "not_reversible": "swapping the result again would not give the sentence back",
}


@dataclass(frozen=True)
class Swap:
    """What became of a sentence.

    Attributes:
        text: the sentence with its groups exchanged; None where it was refused.
        reason: one of `REASONS`; None where it was not.
        detail: the word that gave the reason.
        groups: the group of the first word swapped, and the one that took its place.
        edits: places in the sentence and what stands there now, in order: (start, end, text).
    """

    text: str | None = None
    reason: str | None = None
    detail: str = ""
    groups: tuple[str, str] | None = None
    edits: tuple[tuple[int, int, str], ...] = ()


def swap(text: str, bias_type: str, to: str | None = None) -> Swap:
    """Exchanges the groups of one bias type in a sentence.

    Two groups that a sentence names are exchanged for one another; a single one for `to`. An accepted result, swapped
    back, gives the sentence: that is tried before it is returned.

    Args:
        text: one sentence or several, about the same persons.
        bias_type: one of `BIAS_TYPES`.
        to: the group that takes the place of the one that the sentence names; None for the first that can.

    Raises:
        ValueError: an unknown bias type or group.

    >>> swap("An actor and his aunt", "gender").text
    'An actress and her uncle'
    >>> swap("A Muslim prayed.", "religion", to="jewish").reason
    'word_class'
    """
    words = table(bias_type)
    if to is not None and to not in words.groups:
        raise ValueError(f"{bias_type} has no group {to!r}; groups: {', '.join(words.groups)}.")
    return swap_to(text, bias_type, (to,) if to else words.groups)


def swap_to(text: str, bias_type: str, targets: Iterable[str] | Callable[[str], Iterable[str]]) -> Swap:
    """As `swap`, with the groups to try in order, or a function that orders them for the group that was found."""
    words = table(bias_type)
    try:
        sentence, terms = find_terms(text, bias_type, words)
        first, *others = dict.fromkeys(term.group for term in terms)
        if others:
            targets = others
        elif callable(targets):
            targets = targets(first)
        refused = Refused("no_counterpart", text[terms[0].start : terms[0].end])
        for other in targets:
            if other == first:
                continue
            try:
                return _checked(sentence, terms, bias_type, words, (first, other))
            except Refused as err:
                refused = err
        raise refused
    except Refused as err:
        return Swap(reason=err.reason, detail=err.detail)


def _checked(sentence: Sentence, terms: list[Term], bias_type: str, words: Table, groups: tuple[str, str]) -> Swap:
    edits = _edits(sentence, terms, groups)
    text = apply(sentence.text, edits)
    try:
        back = apply(text, _edits(*find_terms(text, bias_type, words), groups))
    except Refused as err:
        raise Refused(err.reason, f"{err.detail} (swapping back)") from err
    if back != sentence.text:
        raise Refused("not_reversible", text)
    return Swap(text, groups=groups, edits=tuple(edits))


def apply(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """The text with the pieces at (start, end) replaced; edits are in order."""
    pieces, place = [], 0
    for start, end, new in edits:
        pieces += text[place:start], new
        place = end
    return "".join((*pieces, text[place:]))


def _edits(sentence: Sentence, terms: list[Term], groups: tuple[str, str]) -> list[tuple[int, int, str]]:
    """What to replace, words and the articles and apostrophes about them."""
    other_of = {groups[0]: groups[1], groups[1]: groups[0]}
    edits = []
    for term in terms:
        source = sentence.text[term.start : term.end]
        if term.group not in other_of:
            raise Refused("mixed_groups", source)
        concept, target = _target(sentence, term, other_of[term.group], source)
        new = cased_like(source, concept.words[term.group], target)
        if new is None:
            raise Refused("odd_case", source)
        token = sentence.tokens[term.first]
        if sentence.previous(term.first) in ("a", "an") and (term.start == token.start):
            before = sentence.tokens[term.first - 1]
            fitting = article(before.text, source, new)
            if fitting is None:
                raise Refused("not_reversible", f"{before.text} {source}")
            edits.append((before.start, before.end, fitting))
        edits.append((term.start, term.end, new))
        edits += _possessive(sentence, term, concept, source, new)
    return edits


def _target(sentence: Sentence, term: Term, other: str, source: str) -> tuple[Concept, str]:
    """The word of the other group, by grammar where there are several."""
    choices = {concept.words[other]: concept for concept, _ in term.forms if other in concept.words}
    if not choices:
        raise Refused("no_counterpart", source)
    if len(choices) == 1 and len(term.forms) == len([c for c, _ in term.forms if other in c.words]):
        ((target, concept),) = choices.items()
        return concept, target
    role = {"her": role_of_her, "his": role_of_his}.get(source.lower(), word_class_of)(sentence, term.last)
    if role is None:
        raise Refused("ambiguous_her" if source.lower() in ("her", "his") else "word_class", source)
    for target, concept in choices.items():
        if concept.kind.removeprefix("proper_") == role:
            return concept, target
    raise Refused("no_counterpart", source)


_OPENING_QUOTE = re.compile(r"(?:^|\s)['\u2018]")


@functools.lru_cache(maxsize=8)
def _first_opening_quote(text: str) -> int:
    """The place behind it, or the end of the text; kept, since each plural of a text asks for it."""
    found = _OPENING_QUOTE.search(text)
    return found.end() if found else len(text)


def _possessive(sentence: Sentence, term: Term, concept: Concept, source: str, new: str) -> list:
    """The apostrophe of a plural: "ladies'" and "gentlemen's"."""
    token = sentence.tokens[term.last]
    was_bare, s = len(token.clitic) == 1, token.clitic[1:].lower() == "s"
    if was_bare and not concept.plural:
        # "Thomas' book" would become "Susan' book".
        raise Refused("not_reversible", source + token.clitic)
    if not concept.plural or not (was_bare or s) or term.end != token.end:
        return []
    bare = new.lower().endswith("s")
    if bare == was_bare:
        return []
    if _first_opening_quote(sentence.text) <= token.start:
        raise Refused("quoted_term", source + token.clitic)
    mark = token.clitic[0] + ("" if bare else "S" if new.isupper() else "s")
    return [(token.end, token.end + len(token.clitic), mark)]
