"""A sentence with its groups exchanged, or the reason why it is left alone."""

import functools
import itertools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from biasunlearn_trainer.data_builders.counterfactual.grammar import (
    describes_person,
    is_verb,
    role_of_her,
    role_of_his,
    word_class_of,
)
from biasunlearn_trainer.data_builders.counterfactual.names import name_fault
from biasunlearn_trainer.data_builders.counterfactual.tokens import Sentence, article, cased_like
from biasunlearn_trainer.data_builders.counterfactual.words import Concept, Table, table, word_class

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
_CONTEXT = ("adjective", "quality")
_PROPER = ("proper", "proper_noun", "proper_adjective")
_QUOTES = frozenset("\"'“”\u2018\u2019«»`*")


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


class _Refused(Exception):
    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class _Term:
    """An occurrence of a table's word: words `first` to `last`, or a part of one, at `start` to `end` of the text."""

    first: int
    last: int
    start: int
    end: int
    forms: list[tuple[Concept, str]]
    part: bool = False

    @property
    def group(self) -> str:
        return self.forms[0][1]


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
        sentence, terms = _find(text, bias_type, words)
        first, *others = dict.fromkeys(term.group for term in terms)
        if others:
            targets = others
        elif callable(targets):
            targets = targets(first)
        refused = _Refused("no_counterpart", text[terms[0].start : terms[0].end])
        for other in targets:
            if other == first:
                continue
            try:
                return _checked(sentence, terms, bias_type, words, (first, other))
            except _Refused as err:
                refused = err
        raise refused
    except _Refused as err:
        return Swap(reason=err.reason, detail=err.detail)


def _checked(sentence: Sentence, terms: list[_Term], bias_type: str, words: Table, groups: tuple[str, str]) -> Swap:
    edits = _edits(sentence, terms, groups)
    text = apply(sentence.text, edits)
    try:
        back = apply(text, _edits(*_find(text, bias_type, words), groups))
    except _Refused as err:
        raise _Refused(err.reason, f"{err.detail} (swapping back)") from err
    if back != sentence.text:
        raise _Refused("not_reversible", text)
    return Swap(text, groups=groups, edits=tuple(edits))


def apply(text: str, edits: Iterable[tuple[int, int, str]]) -> str:
    """The text with the pieces at (start, end) replaced; edits are in order."""
    pieces, place = [], 0
    for start, end, new in edits:
        pieces += text[place:start], new
        place = end
    return "".join((*pieces, text[place:]))


def _find(text: str, bias_type: str, words: Table) -> tuple[Sentence, list[_Term]]:
    """The words of the table in a text, each checked by the rules for its kind."""
    sentence = _sentence(text)
    terms, refused, i = [], None, 0
    while i < len(sentence.tokens):
        lower = sentence.tokens[i].lower
        if lower in words.refusals:
            refused = refused or _listed_refusal(sentence, i, words)
        term = None
        if lower in words.forms or lower in words.phrases:
            term = _whole(sentence, i, words)
        elif "-" in lower:
            term = _part(sentence, i, words)
        if term:
            terms.append(term)
        i = term.last + 1 if term else i + 1
    if refused and (terms or refused.reason == "no_counterpart"):
        raise refused
    if not terms:
        raise _Refused("no_term", bias_type)
    for term in terms:
        _check(sentence, term, bias_type)
    if bias_type == "gender" and (fault := name_fault(sentence)):
        raise _Refused(*fault)
    _check_mixture(sentence, terms)
    return sentence, terms


@functools.lru_cache(maxsize=8)
def _sentence(text: str) -> Sentence:
    """The words of a text; kept, since one text is often asked about for one bias type after the other."""
    return Sentence(text, word_class("title"))


def _listed_refusal(sentence: Sentence, i: int, words: Table) -> _Refused | None:
    tokens = sentence.tokens[i : i + 4]
    for phrase, reason, capital in words.refusals[sentence.tokens[i].lower]:
        found = len(tokens) >= len(phrase) and all(
            token.lower == word for token, word in zip(tokens, phrase, strict=False)
        )
        if found and (not capital or tokens[0].text[0].isupper()):
            return _Refused(reason, " ".join(phrase))
    return None


def _whole(sentence: Sentence, i: int, words: Table) -> _Term | None:
    tokens = sentence.tokens
    for phrase in words.phrases.get(tokens[i].lower, ()):
        span = tokens[i : i + len(phrase)]
        together = all(token.before == " " for token in span[1:]) and not any(token.clitic for token in span[:-1])
        if together and tuple(token.lower for token in span) == phrase:
            last = i + len(phrase) - 1
            return _Term(i, last, tokens[i].start, tokens[last].end, words.forms[" ".join(phrase)])
    forms = words.forms.get(tokens[i].lower)
    return _Term(i, i, tokens[i].start, tokens[i].end, forms) if forms else None


def _part(sentence: Sentence, i: int, words: Table) -> _Term | None:
    """A word of the table in a hyphenated one: "ex-husband", "Iranian-born"."""
    token = sentence.tokens[i]
    parts = token.lower.split("-")
    if not any(part in words.forms for part in parts):
        return None
    head, tail = parts[0], parts[-1]
    if tail in words.forms and all(part in word_class("prefix") for part in parts[:-1]):
        return _Term(i, i, token.end - len(tail), token.end, words.forms[tail], part=True)
    if head in words.forms and len(parts) == 2 and tail in word_class("suffix") and tail != "american":
        return _Term(i, i, token.start, token.start + len(head), words.forms[head], part=True)
    raise _Refused("compound", token.text)


def _check(sentence: Sentence, term: _Term, bias_type: str) -> None:
    """Refuses a word by the rules for its kind."""
    text, kind = sentence.text[term.start : term.end], term.forms[0][0].kind
    if kind == "name" and text[0].islower():
        raise _Refused("odd_case", text)
    before, after = sentence.text[: term.start].rstrip(" ")[-1:], sentence.text[term.end : term.end + 1]
    quoted = before in _QUOTES and after in _QUOTES and before and after and sentence.tokens[term.last].clitic == ""
    if quoted or sentence.previous(term.first) in word_class("term_marker"):
        raise _Refused("quoted_term", text)
    if kind in _CONTEXT and not term.part:
        if not describes_person(sentence, term.first, term.last, nominal=kind == "adjective"):
            raise _Refused("other_sense", text)
    elif kind == "noun" and is_verb(sentence, term.first, plural=term.forms[0][0].plural):
        raise _Refused("other_sense", text)
    elif kind in _PROPER:
        _check_capitals(sentence, term, text)
        if text.lower() in word_class("also_name") and not _is_no_name(sentence, term):
            raise _Refused("other_sense", text)
        if kind == "proper_adjective" and bias_type == "nationality":
            _check_adjective(sentence, term, text)


def _check_capitals(sentence: Sentence, term: _Term, text: str) -> None:
    """Refuses a word that is part of a longer name: "New Mexico", "Korean War", "Mexican American"."""
    tokens = sentence.tokens
    before, after = sentence.previous(term.first), sentence.next(term.last)
    if before in word_class("compound_before"):
        raise _Refused("compound", f"{before} {text}")
    if sentence.upper:
        return
    if after and tokens[term.last + 1 :] and tokens[term.last + 1].text[0].isupper() and after != "i":
        raise _Refused("compound", f"{text} {tokens[term.last + 1].text}")
    if before and tokens[term.first - 1].text[0].isupper() and not tokens[term.first - 1].initial:
        raise _Refused("compound", f"{tokens[term.first - 1].text} {text}")


def _is_no_name(sentence: Sentence, term: _Term) -> bool:
    """Whether "Christian" is no given name: an article or a form of "be" before it, or a noun for people after it."""
    before, after = sentence.previous(term.first), sentence.next(term.last)
    led = any(before in word_class(name) for name in ("determining", "be", "degree", "modifier"))
    return led or after in word_class("person") or after in word_class("institution")


def _check_adjective(sentence: Sentence, term: _Term, text: str) -> None:
    if sentence.previous(term.first) in ("a", "an", "one", "another", "every", "each"):
        word = sentence.next(term.last)
        if word not in word_class("person") and word not in word_class("institution"):
            raise _Refused("word_class", text)
    if sentence.tokens[term.last].clitic:
        raise _Refused("word_class", text)


def _check_mixture(sentence: Sentence, terms: list[_Term]) -> None:
    if len({term.group for term in terms}) > 2:
        raise _Refused("mixed_groups", ", ".join(dict.fromkeys(term.group for term in terms)))
    for one, other in itertools.pairwise(terms):
        between = sentence.text[one.end : other.start].lower().split()
        joined = between and between[0] in ("and", "or", "&", "nor") and len(between) < 3
        # "her father nor his": a noun and a pronoun are no pair.
        joined = joined and between[1:] in _ARTICLES and _is_pronoun(one) == _is_pronoun(other)
        if one.group != other.group and (joined or between == ["/"]):
            raise _Refused("mixed_groups", sentence.text[one.start : other.end])


def _is_pronoun(term: _Term) -> bool:
    return term.forms[0][0].kind in ("subject", "object", "determiner", "possessive", "reflexive")


_ARTICLES = ([], ["a"], ["an"], ["the"])


def _edits(sentence: Sentence, terms: list[_Term], groups: tuple[str, str]) -> list[tuple[int, int, str]]:
    """What to replace, words and the articles and apostrophes about them."""
    other_of = {groups[0]: groups[1], groups[1]: groups[0]}
    edits = []
    for term in terms:
        source = sentence.text[term.start : term.end]
        if term.group not in other_of:
            raise _Refused("mixed_groups", source)
        concept, target = _target(sentence, term, other_of[term.group], source)
        new = cased_like(source, concept.words[term.group], target)
        if new is None:
            raise _Refused("odd_case", source)
        token = sentence.tokens[term.first]
        if sentence.previous(term.first) in ("a", "an") and (term.start == token.start):
            before = sentence.tokens[term.first - 1]
            fitting = article(before.text, source, new)
            if fitting is None:
                raise _Refused("not_reversible", f"{before.text} {source}")
            edits.append((before.start, before.end, fitting))
        edits.append((term.start, term.end, new))
        edits += _possessive(sentence, term, concept, source, new)
    return edits


def _target(sentence: Sentence, term: _Term, other: str, source: str) -> tuple[Concept, str]:
    """The word of the other group, by grammar where there are several."""
    choices = {concept.words[other]: concept for concept, _ in term.forms if other in concept.words}
    if not choices:
        raise _Refused("no_counterpart", source)
    if len(choices) == 1 and len(term.forms) == len([c for c, _ in term.forms if other in c.words]):
        ((target, concept),) = choices.items()
        return concept, target
    role = {"her": role_of_her, "his": role_of_his}.get(source.lower(), word_class_of)(sentence, term.last)
    if role is None:
        raise _Refused("ambiguous_her" if source.lower() in ("her", "his") else "word_class", source)
    for target, concept in choices.items():
        if concept.kind.removeprefix("proper_") == role:
            return concept, target
    raise _Refused("no_counterpart", source)


_OPENING_QUOTE = re.compile(r"(?:^|\s)['\u2018]")


def _possessive(sentence: Sentence, term: _Term, concept: Concept, source: str, new: str) -> list:
    """The apostrophe of a plural: "ladies'" and "gentlemen's"."""
    token = sentence.tokens[term.last]
    was_bare, s = len(token.clitic) == 1, token.clitic[1:].lower() == "s"
    if was_bare and not concept.plural:
        # "Thomas' book" would become "Susan' book".
        raise _Refused("not_reversible", source + token.clitic)
    if not concept.plural or not (was_bare or s) or term.end != token.end:
        return []
    bare = new.lower().endswith("s")
    if bare == was_bare:
        return []
    if _OPENING_QUOTE.search(sentence.text, 0, token.start):
        raise _Refused("quoted_term", source + token.clitic)
    mark = token.clitic[0] + ("" if bare else "S" if new.isupper() else "s")
    return [(token.end, token.end + len(token.clitic), mark)]
