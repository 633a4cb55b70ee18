"""Words of a sentence with their places, and the spelling of a word that takes another's place."""

import re

# Letters, hyphenated ones as one word, and what an apostrophe hangs on it; a bare apostrophe only after an s.
_WORD = re.compile(
    r"([^\W\d_]+(?:-[^\W\d_]+)*)"
    r"(['\u2019](?:s|ll|d|ve|re|m|t)(?![^\W_])|(?<=s)['\u2019](?![^\W_]))?",
    re.IGNORECASE,
)
_SENTENCE_END = frozenset('.!?:"“\n')
NUMBER = "#"
# Written with a vowel and spoken without one, or the reverse.
_CONSONANT_SOUND = re.compile(r"(?:uni(?!n|m)|us[aeiu]|eu|uk|uga|uru|ewe|one\b|once\b|ut[ei])", re.IGNORECASE)
_SILENT_H = re.compile(r"(?:heir|honest|hono|hour)", re.IGNORECASE)


class Token:
    """One word.

    Attributes:
        text, lower: as written, and in small letters; the clitic is no part of it.
        start, end: its place in the text.
        clitic: "'s", "'ll", "n't"'s "'t", "'" after a plural, or "".
        before: what stands between the word before (with its clitic) and this one.
        initial: whether it begins a sentence or a quotation.
    """

    __slots__ = ("before", "clitic", "end", "initial", "lower", "start", "text")

    def __init__(self, text: str, start: int, clitic: str, before: str, initial: bool):
        self.text, self.lower, self.start, self.end = text, text.lower(), start, start + len(text)
        self.clitic, self.before, self.initial = clitic, before, initial


class Sentence:
    """A text and its words.

    Attributes:
        text: the text; of one or several sentences.
        tokens: its words in order.
        upper: whether it is written in capitals throughout.
    """

    __slots__ = ("text", "tokens", "upper")

    def __init__(self, text: str, titles: frozenset[str] = frozenset()):
        """Splits a text; after `titles` ("Mr") a full stop ends no sentence."""
        self.text, self.tokens, start, last = text, [], 0, ""
        # In turn: what stands between two words, a word, its clitic or None; at the end what follows the last one.
        pieces = iter(_WORD.split(text))
        for before, word, clitic in zip(pieces, pieces, pieces, strict=False):
            start += len(before)
            initial = not last or (before != " " and not _SENTENCE_END.isdisjoint(before))
            if initial and before == ". " and last in titles:
                initial = False
            token = Token(word, start, clitic or "", before, initial)
            self.tokens.append(token)
            start, last = token.end + len(token.clitic), token.lower
        self.upper = text.isupper()

    def next(self, i: int) -> str:
        """The following word in small letters; "#" for a number; "" at the end or before punctuation."""
        token = self.tokens[i]
        if i + 1 < len(self.tokens):
            after = self.tokens[i + 1]
            if after.before == " ":
                return after.lower
            gap = after.before
        else:
            gap = self.text[token.end + len(token.clitic) :]
        stripped = gap.lstrip()
        return NUMBER if stripped != gap and stripped[:1].isdigit() else ""

    def previous(self, i: int) -> str:
        """The preceding word in small letters, "" at the start or after punctuation; its clitic is left off."""
        return self.tokens[i - 1].lower if i and self.tokens[i].before == " " else ""

    def after(self, i: int) -> str:
        """The first character that follows a word and is no space, "" at the end."""
        if i + 1 < len(self.tokens):
            following = self.tokens[i + 1]
            return (following.before.lstrip() or following.text)[:1]
        token = self.tokens[i]
        return self.text[token.end + len(token.clitic) :].lstrip()[:1]


def cased_like(source: str, listed: str, target: str) -> str | None:
    """Writes `target` in the case in which `source` writes the listed word.

    Returns:
        None where the source is written in no usual case ("hE", "muslim").

    >>> cased_like("Woman", "woman", "man"), cased_like("WOMAN", "woman", "man"), cased_like("hE", "he", "she")
    ('Man', 'MAN', None)
    """
    if source == listed:
        return target
    if source == listed.upper() and len(source) > 1:
        return target.upper()
    if source == listed[:1].upper() + listed[1:]:
        return target[:1].upper() + target[1:]
    return None


def wants_an(word: str) -> bool:
    """Whether "an" stands before a word.

    >>> [wants_an(word) for word in ("actress", "woman", "heir", "European", "uncle")]
    [True, False, True, False, True]
    """
    if word[:1].lower() == "h":
        return bool(_SILENT_H.match(word))
    return word[:1].lower() in "aeiou" and not _CONSONANT_SOUND.match(word)


def article(old: str, old_word: str, new_word: str) -> str | None:
    """The article before a new word, None where the old one did not fit the old word.

    >>> article("An", "actress", "waiter"), article("a", "man", "aunt"), article("an", "man", "woman")
    ('A', 'an', None)
    """
    if (old.lower() == "an") != wants_an(old_word):
        return None
    if not wants_an(new_word):
        return {"an": "a"}.get(old.lower(), old.lower()) if old[0].islower() else "A"
    if old[0].islower():
        return "an"
    return "AN" if new_word.isupper() and len(new_word) > 1 else "An"
