"""Which capitalised words make a swap of gender unsafe: persons of history, full names, names that no list knows."""

from biasunlearn_trainer.data_builders.counterfactual.tokens import NUMBER, Sentence
from biasunlearn_trainer.data_builders.counterfactual.words import proper_words, table, word_class

ROYAL = frozenset(("king", "queen", "prince", "princess", "duke", "duchess", "emperor", "empress", "sir", "baron"))


def name_fault(sentence: Sentence) -> tuple[str, str] | None:
    """A reason, and the word that gives it, why the names of a sentence make a swap of gender unsafe; or None.

    A sentence in capitals shows no names: there only the words of the lists are seen.
    """
    if sentence.upper:
        return None
    known = table("gender").forms
    for i, token in enumerate(sentence.tokens):
        if not token.text[0].isupper():
            continue
        after_title = i and sentence.tokens[i - 1].lower in word_class("title") and token.before in (" ", ". ")
        capital_follows = i + 1 < len(sentence.tokens) and _is_capital_next(sentence, i)
        if _is_name(known, token.lower):
            if capital_follows or after_title:
                return "named_person", token.text
        elif token.lower in ROYAL and capital_follows:
            return "named_person", token.text
        elif token.lower in known or after_title or _is_known(sentence, i):
            continue
        elif not token.initial or _looks_like_a_name(sentence, i):
            return "unknown_name", token.text
    return None


def _is_name(known: dict, word: str) -> bool:
    return any(concept.kind == "name" for concept, _ in known.get(word, ()))


def _is_capital_next(sentence: Sentence, i: int) -> bool:
    after = sentence.tokens[i + 1]
    return after.before == " " and after.text[0].isupper() and after.lower not in word_class("not_name")


def _is_known(sentence: Sentence, i: int) -> bool:
    token = sentence.tokens[i]
    if token.lower in word_class("month_name"):
        return sentence.previous(i) in word_class("month_before") or (token.lower == "may" and token.initial)
    known = (
        token.lower in word_class("not_name") or token.lower in proper_words() or token.lower in word_class("unisex")
    )
    return known or token.lower in word_class("title")


def _looks_like_a_name(sentence: Sentence, i: int) -> bool:
    """Whether an unknown word that begins a sentence stands where a name would, and a common noun needs an article."""
    token, word = sentence.tokens[i], sentence.next(i)
    if token.lower in word_class("starter") or any(token.lower in word_class(name) for name in _COMMON):
        return False
    if token.lower in word_class("name_in_s") or token.clitic[1:] in ("s", "d", "ll"):
        return True
    if word == NUMBER:
        return False
    after = sentence.tokens[i + 1] if i + 1 < len(sentence.tokens) else None
    if word and after.text[0].isupper():
        return after.lower not in table("gender").forms
    if not word:
        return after is not None and after.lower in ("who", "and") and not token.lower.endswith("s")
    if token.lower.endswith("s"):
        return word in ("is", "was", "has", "does")
    return (
        word in ("and", "or", "&")
        or word in word_class("auxiliary")
        or word in word_class("initial_verb")
        or word in word_class("finite_verb")
        or word in ("never", "always", "often", "also")
        or (word.endswith(("ed", "s", "ly")) and word not in word_class("person"))
    )


_COMMON = ("person", "kin", "owned", "institution", "modifier", "adverb", "degree", "preposition")
