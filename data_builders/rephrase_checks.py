"""Is a rephrasing usable? It must be another text, name the same people, keep the answer, and mean the same.

The words that name people are those of the counterfactuals' word files; a pronoun may change its case ("she", "her"),
every other term must stay.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.loading import one_at_a_time

PRONOUNS = ("subject", "object", "determiner", "possessive", "reflexive")
MAX_LENGTH_RATIO = 3.0
_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
_NEGATION = re.compile(
    r"\b(?:not|no|never|none|nobody|nothing|neither|nor|cannot|without)\b|n['\u2019]t\b", re.IGNORECASE
)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def words(text: str) -> list[str]:
    """The words of a text in small letters.

    >>> words("It isn't Ann's.")
    ['it', "isn't", "ann's"]
    """
    return [word.casefold() for word in _WORD.findall(text)]


def contains(text: str, phrase: str) -> bool:
    """Whether a phrase stands in a text, word for word; a possessive counts as its owner."""
    inside, wanted = _plain_words(text), _plain_words(phrase)
    return any(inside[at : at + len(wanted)] == wanted for at in range(len(inside) - len(wanted) + 1))


def _plain_words(text: str) -> list[str]:
    return [re.sub(r"['\u2019]s$", "", word) for word in words(text)]


@functools.cache
def _listed() -> tuple[dict[str, set[tuple[str, str]]], frozenset[str], int]:
    """Of each listed term its (bias type, group); those that are pronouns; and the number of words of the longest."""
    from biasunlearn_trainer.data_builders.counterfactual.words import BIAS_TYPES, table

    groups: dict[str, set[tuple[str, str]]] = {}
    pronouns = set()
    for bias_type in BIAS_TYPES:
        for term, forms in table(bias_type).forms.items():
            term = " ".join(words(term))
            groups.setdefault(term, set()).update((bias_type, group) for _, group in forms)
            if all(concept.kind in PRONOUNS for concept, _ in forms):
                pronouns.add(term)
    return groups, frozenset(pronouns), max(term.count(" ") + 1 for term in groups)


def demographic_terms(text: str, more: Sequence[str] = ()) -> tuple[set[str], set[tuple[str, str]]]:
    """Finds who is named.

    Args:
        text: any.
        more: further terms to look for.

    Returns:
        The terms that are no pronouns, in small letters; and the (bias type, group) of all terms, pronouns too.

    >>> demographic_terms("She is a nurse.")[1]
    {('gender', 'female')}
    """
    groups, pronouns, longest = _listed()
    inside, terms, named, at = _plain_words(text), set(), set(), 0
    while at < len(inside):
        for length in range(min(longest, len(inside) - at), 0, -1):
            term = " ".join(inside[at : at + length])
            if term in groups:
                named |= groups[term]
                terms |= set() if term in pronouns else {term}
                at += length
                break
        else:
            at += 1
    return terms | {term for term in more if contains(text, term)}, named


def fault_of(
    original: str, rephrased: str, row: Mapping[str, Any], more_terms: Sequence[str] = ()
) -> tuple[str, str] | None:
    """Says why a rephrasing cannot be used.

    Args:
        original: the text that was rephrased.
        rephrased: what came back.
        row: the row that it stands in: an answer (`completion`, `rejected`) that the original names must still be
            named, and so must `target`.
        more_terms: further terms that must stay.

    Returns:
        The reason, the same for all faults of a kind, and what it is about here; or None.
    """
    new = words(rephrased)
    if not new:
        return "empty", repr(rephrased)
    if new == words(original):
        return "not different", rephrased
    if len(new) > MAX_LENGTH_RATIO * len(words(original)) + 5 or "�" in rephrased:
        return "garbage", f"{len(new)} words for {len(words(original))}: {rephrased[:200]}"
    terms, groups = demographic_terms(original, more_terms)
    new_terms, new_groups = demographic_terms(rephrased, more_terms)
    if terms - new_terms or groups - new_groups:
        return "lost a demographic term", ", ".join(sorted(terms - new_terms) or map("/".join, groups - new_groups))
    if new_terms - terms or new_groups - groups:
        return "new demographic term", ", ".join(sorted(new_terms - terms) or map("/".join, new_groups - groups))
    for column in ("target", "completion", "rejected"):
        answer = row.get(column)
        if isinstance(answer, str) and words(answer) and contains(original, answer) and not contains(rephrased, answer):
            return "lost the answer", answer.strip()
    if sorted(_NUMBER.findall(original)) != sorted(_NUMBER.findall(rephrased)):
        return "changed a number", rephrased
    if bool(_NEGATION.search(original)) != bool(_NEGATION.search(rephrased)):
        return "changed a negation", rephrased
    if original.rstrip().endswith("?") != rephrased.rstrip().endswith("?"):
        return "question and statement", rephrased
    return None


class MeaningCheck:
    """Cosine similarity of two texts' embeddings by a sentence-transformers model.

    Args:
        model: a path or Hub id.
        min_similarity: from which on two texts mean the same, in -1..1.

    Raises:
        ImportError: sentence-transformers is not installed.
    """

    @one_at_a_time
    def __init__(self, model: str, min_similarity: float):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as err:
            raise ImportError(
                "`meaning_model` needs sentence-transformers: pip install 'biasunlearn_trainer[generate]', or leave it "
                "out."
            ) from err
        self.min_similarity = min_similarity
        self._model = SentenceTransformer(model)

    def similarity(self, first: str, second: str) -> float:
        """The cosine similarity, in -1..1."""
        one, other = self._model.encode([first, second], normalize_embeddings=True, show_progress_bar=False)
        return float(one @ other)

    def fault_of(self, first: str, second: str) -> tuple[str, str] | None:
        """The reason and the similarity where the second text is too far from the first."""
        found = self.similarity(first, second)
        return None if found >= self.min_similarity else ("another meaning", f"similarity {found:.3f}: {second}")
