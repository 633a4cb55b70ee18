"""The words of a table in a text, each passed by the rules for its kind; else the reason why the text is refused."""

import functools
import itertools
from dataclasses import dataclass

from biasunlearn_trainer.data_builders.counterfactual.grammar import describes_person, is_verb
from biasunlearn_trainer.data_builders.counterfactual.names import name_fault
from biasunlearn_trainer.data_builders.counterfactual.tokens import Sentence
from biasunlearn_trainer.data_builders.counterfactual.words import Concept, Table, word_class

_CONTEXT = ("adjective", "quality")
_PROPER = ("proper", "proper_noun", "proper_adjective")
_QUOTES = frozenset("\"'“”\u2018\u2019«»`*")
_ARTICLES = ([], ["a"], ["an"], ["the"])


class Refused(Exception):
    """A sentence that is not swapped: one of `swap.REASONS`, and the word that gave it."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Term:
    """An occurrence of a table's word: words `first` to `last`, or a part of one, at `start` to `end` of the text."""

    first: int
    last: int
    start: int
    end: int
    forms: list[tuple[Concept, str]]
    part: bool = False

    @property
    def group(self) -> str:
        """The group that its word stands for."""
        return self.forms[0][1]


def find_terms(text: str, bias_type: str, words: Table) -> tuple[Sentence, list[Term]]:
    """Finds the words of the table in a text, and checks each by the rules for its kind.

    Raises:
        Refused: there is none, one does not pass, or something else in the text makes a swap unsafe.
    """
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
        raise Refused("no_term", bias_type)
    for term in terms:
        _check(sentence, term, bias_type)
    if bias_type == "gender" and (fault := name_fault(sentence)):
        raise Refused(*fault)
    _check_mixture(sentence, terms)
    return sentence, terms


@functools.lru_cache(maxsize=8)
def _sentence(text: str) -> Sentence:
    """The words of a text; kept, since one text is often asked about for one bias type after the other."""
    return Sentence(text, word_class("title"))


def _listed_refusal(sentence: Sentence, i: int, words: Table) -> Refused | None:
    tokens = sentence.tokens[i : i + 4]
    for phrase, reason, capital in words.refusals[sentence.tokens[i].lower]:
        found = len(tokens) >= len(phrase) and all(
            token.lower == word for token, word in zip(tokens, phrase, strict=False)
        )
        if found and (not capital or tokens[0].text[0].isupper()):
            return Refused(reason, " ".join(phrase))
    return None


def _whole(sentence: Sentence, i: int, words: Table) -> Term | None:
    tokens = sentence.tokens
    for phrase in words.phrases.get(tokens[i].lower, ()):
        span = tokens[i : i + len(phrase)]
        together = all(token.before == " " for token in span[1:]) and not any(token.clitic for token in span[:-1])
        if together and tuple(token.lower for token in span) == phrase:
            last = i + len(phrase) - 1
            return Term(i, last, tokens[i].start, tokens[last].end, words.forms[" ".join(phrase)])
    forms = words.forms.get(tokens[i].lower)
    return Term(i, i, tokens[i].start, tokens[i].end, forms) if forms else None


def _part(sentence: Sentence, i: int, words: Table) -> Term | None:
    """A word of the table in a hyphenated one: "ex-husband", "Iranian-born"."""
    token = sentence.tokens[i]
    parts = token.lower.split("-")
    if not any(part in words.forms for part in parts):
        return None
    head, tail = parts[0], parts[-1]
    if tail in words.forms and all(part in word_class("prefix") for part in parts[:-1]):
        return Term(i, i, token.end - len(tail), token.end, words.forms[tail], part=True)
    if head in words.forms and len(parts) == 2 and tail in word_class("suffix") and tail != "american":
        return Term(i, i, token.start, token.start + len(head), words.forms[head], part=True)
    raise Refused("compound", token.text)


def _character_before(text: str, place: int) -> str:
    """The last character before a place that is no blank, "" at the start."""
    while place and text[place - 1] == " ":
        place -= 1
    return text[max(place - 1, 0) : place]


def _check(sentence: Sentence, term: Term, bias_type: str) -> None:
    """Refuses a word by the rules for its kind."""
    text, kind = sentence.text[term.start : term.end], term.forms[0][0].kind
    if kind == "name" and text[0].islower():
        raise Refused("odd_case", text)
    before, after = _character_before(sentence.text, term.start), sentence.text[term.end : term.end + 1]
    quoted = before in _QUOTES and after in _QUOTES and before and after and sentence.tokens[term.last].clitic == ""
    if quoted or sentence.previous(term.first) in word_class("term_marker"):
        raise Refused("quoted_term", text)
    if kind in _CONTEXT and not term.part:
        if not describes_person(sentence, term.first, term.last, nominal=kind == "adjective"):
            raise Refused("other_sense", text)
    elif kind == "noun" and is_verb(sentence, term.first, plural=term.forms[0][0].plural):
        raise Refused("other_sense", text)
    elif kind in _PROPER:
        _check_capitals(sentence, term, text)
        if text.lower() in word_class("also_name") and not _is_no_name(sentence, term):
            raise Refused("other_sense", text)
        if kind == "proper_adjective" and bias_type == "nationality":
            _check_adjective(sentence, term, text)


def _check_capitals(sentence: Sentence, term: Term, text: str) -> None:
    """Refuses a word that is part of a longer name: "New Mexico", "Korean War", "Mexican American"."""
    tokens = sentence.tokens
    before, after = sentence.previous(term.first), sentence.next(term.last)
    if before in word_class("compound_before"):
        raise Refused("compound", f"{before} {text}")
    if sentence.upper:
        return
    if after and tokens[term.last + 1 :] and tokens[term.last + 1].text[0].isupper() and after != "i":
        raise Refused("compound", f"{text} {tokens[term.last + 1].text}")
    if before and tokens[term.first - 1].text[0].isupper() and not tokens[term.first - 1].initial:
        raise Refused("compound", f"{tokens[term.first - 1].text} {text}")


def _is_no_name(sentence: Sentence, term: Term) -> bool:
    """Whether "Christian" is no given name: an article or a form of "be" before it, or a noun for people after it."""
    before, after = sentence.previous(term.first), sentence.next(term.last)
    led = any(before in word_class(name) for name in ("determining", "be", "degree", "modifier"))
    return led or after in word_class("person") or after in word_class("institution")


def _check_adjective(sentence: Sentence, term: Term, text: str) -> None:
    if sentence.previous(term.first) in ("a", "an", "one", "another", "every", "each"):
        word = sentence.next(term.last)
        if word not in word_class("person") and word not in word_class("institution"):
            raise Refused("word_class", text)
    if sentence.tokens[term.last].clitic:
        raise Refused("word_class", text)


def _check_mixture(sentence: Sentence, terms: list[Term]) -> None:
    if len({term.group for term in terms}) > 2:
        raise Refused("mixed_groups", ", ".join(dict.fromkeys(term.group for term in terms)))
    for one, other in itertools.pairwise(terms):
        between = sentence.text[one.end : other.start].lower().split()
        joined = between and between[0] in ("and", "or", "&", "nor") and len(between) < 3
        # "her father nor his": a noun and a pronoun are no pair.
        joined = joined and between[1:] in _ARTICLES and _is_pronoun(one) == _is_pronoun(other)
        if one.group != other.group and (joined or between == ["/"]):
            raise Refused("mixed_groups", sentence.text[one.start : other.end])


def _is_pronoun(term: Term) -> bool:
    return term.forms[0][0].kind in ("subject", "object", "determiner", "possessive", "reflexive")
