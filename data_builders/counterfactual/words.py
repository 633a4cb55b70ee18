"""The word files: a table of groups for every bias type, classes of words for the grammar, and what is refused."""

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources

from biasunlearn_trainer.data_builders import schema
from biasunlearn_trainer.data_builders.counterfactual.tokens import Sentence

# There are no words for what is of no type.
BIAS_TYPES = tuple(bias_type for bias_type in schema.BIAS_TYPES if bias_type != "other")
KINDS = (
    "subject",
    "object",
    "determiner",
    "possessive",
    "reflexive",
    "title",
    "name",
    "noun",
    "other",
    "adjective",
    "quality",
    "proper",
    "proper_noun",
    "proper_adjective",
)
EMPTY = "-"


@dataclass(frozen=True)
class Concept:
    """One word in each group: "mother" and "father".

    Attributes:
        kind: one of `KINDS`, which decides the rules that it has to pass.
        plural: whether the words are plurals.
        words: by group; a group that has none is absent.
    """

    kind: str
    plural: bool
    words: dict[str, str]


@dataclass
class Table:
    """The words of a bias type.

    Attributes:
        groups: their names.
        forms: of a word in small letters, the concepts it stands for and the group; several for "her" and "his".
        phrases: of a first word, the whole phrases of several words that begin with it, the longest first.
        refusals: of a first word, the phrases (in words) that are refused, with their reason and whether they are
            meant only with a capital.
    """

    groups: tuple[str, ...]
    forms: dict[str, list[tuple[Concept, str]]] = field(default_factory=dict)
    phrases: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    refusals: dict[str, list[tuple[tuple[str, ...], str, bool]]] = field(default_factory=dict)

    def add(self, concept: Concept) -> None:
        """Adds a row of a word file.

        Raises:
            ValueError: a word is already there for another group.
        """
        for group, word in concept.words.items():
            forms = self.forms.setdefault(word.lower(), [])
            if any(other != group for _, other in forms):
                raise ValueError(f"{word!r} stands for {group} and for {forms[0][1]}; a word has one group.")
            forms.append((concept, group))
            first, *rest = word.lower().split(" ")
            if rest:
                self.phrases.setdefault(first, []).append((first, *rest))
                self.phrases[first].sort(key=len, reverse=True)


def _lines(name: str) -> Iterator[list[str]]:
    text = resources.files("biasunlearn_trainer.data_builders").joinpath("words", f"{name}.tsv").read_text("utf-8")
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.split("\t")


def _concepts(name: str) -> tuple[tuple[str, ...], list[Concept]]:
    """The groups and rows of a word file, whichever way it is laid out."""
    header, *lines = _lines(name)
    if header[0] == "kind":
        groups = tuple(header[2:])
        heads = [(kind, number) for kind, number, *_ in lines]
        columns = [dict(zip(groups, words, strict=True)) for _, _, *words in lines]
    else:
        groups = tuple(line[0] for line in lines)
        heads = [tuple(head.split(" ")) for head in header[1:]]
        columns = [{line[0]: line[place] for line in lines} for place in range(1, len(header))]
    concepts = []
    for (kind, number), words in zip(heads, columns, strict=True):
        if kind not in KINDS:
            raise ValueError(f"words/{name}.tsv has the kind {kind!r}; valid: {', '.join(KINDS)}.")
        concepts.append(Concept(kind, number == "pl", {g: word for g, word in words.items() if word != EMPTY}))
    return groups, concepts


@functools.cache
def table(bias_type: str) -> Table:
    """The table of a bias type.

    Raises:
        ValueError: there is none, or its file contradicts itself.
    """
    if bias_type not in BIAS_TYPES:
        raise ValueError(f"No word pairs for bias type {bias_type!r}; there are some for: {', '.join(BIAS_TYPES)}.")
    groups, concepts = _concepts(bias_type)
    if bias_type == "gender":
        concepts += _concepts("names")[1]
    made = Table(groups)
    for concept in concepts:
        made.add(concept)
    for meant, reason, phrases in _lines("refused"):
        if meant in ("any", bias_type):
            for phrase in phrases.split(", "):
                words = tuple(token.lower for token in Sentence(phrase).tokens)
                made.refusals.setdefault(words[0], []).append((words, reason, phrase[0].isupper()))
    return made


@functools.cache
def word_class(name: str) -> frozenset[str]:
    """The words of a class of `word_classes.tsv`, in small letters."""
    words = [word.lower() for line_name, words in _lines("word_classes") if line_name == name for word in words.split()]
    if not words:
        raise ValueError(f"words/word_classes.tsv has no class {name!r}.")
    return frozenset(words)


@functools.cache
def proper_words() -> frozenset[str]:
    """Words of all tables but names that are always written with a capital, in small letters."""
    return frozenset(
        word.lower()
        for bias_type in BIAS_TYPES
        for forms in table(bias_type).forms.values()
        for concept, group in forms
        for word in (concept.words[group],)
        if word[0].isupper() and concept.kind not in ("name", "title")
    )


@functools.cache
def words_version() -> str:
    """Twelve digits that change with any word file: part of a build's key."""
    names = sorted((*BIAS_TYPES, "names", "refused", "word_classes"))
    text = repr([(name, list(_lines(name))) for name in names])
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()
