"""Rules of grammar by neighbouring words: what "her" and "his" are, whether an adjective describes a person.

Each returns None, or a reason, where the neighbours do not decide. They look at one or two words to either side and at
closed classes of words (`words/word_classes.tsv`); there is no tagger.
"""

from biasunlearn_trainer.data_builders.counterfactual.tokens import NUMBER, Sentence
from biasunlearn_trainer.data_builders.counterfactual.words import proper_words, word_class

_QUOTES = frozenset("\"'“”\u2018\u2019«([")


def _closed(word: str) -> bool:
    """Whether a word cannot be a noun, an adjective or a full verb, as far as the lists know."""
    return word in word_class("preposition") or word in _clause_words() or word in word_class("adverb")


def _clause_words() -> frozenset[str]:
    global _CLAUSE_WORDS
    if _CLAUSE_WORDS is None:
        names = ("conjunction", "determiner", "pronoun", "possessive", "auxiliary")
        _CLAUSE_WORDS = frozenset().union(*map(word_class, names))
    return _CLAUSE_WORDS


_CLAUSE_WORDS: frozenset[str] | None = None


def _known_noun(word: str) -> bool:
    return any(word in word_class(name) for name in ("kin", "owned", "person", "institution"))


def role_of_her(sentence: Sentence, i: int) -> str | None:
    """`object` (him) or `determiner` (his) for the "her" at word `i`; None where both would do.

    In this order: at the end, before punctuation or a word of a closed class it is the object; at the start, before
    "own" or a noun of the lists it is the possessive; after a verb that takes two objects or a bare verb
    ("give", "see", "call") and before any other word nobody can tell; else it is the possessive.
    """
    token, word, before = sentence.tokens[i], sentence.next(i), sentence.previous(i)
    if token.clitic or (not word and sentence.after(i) in _QUOTES and sentence.after(i)):
        return None
    if not word:
        return "object"
    if token.initial and i + 1 < len(sentence.tokens) and not _closed(word):
        return "determiner"
    two_objects, preposition = before in word_class("second_object"), before in word_class("preposition")
    if word == "own":
        return "determiner"
    if word in word_class("kin"):
        return "determiner"
    if word in word_class("ambiguous_after_her"):
        return "determiner" if preposition and _known_noun_follows(sentence, i) else None
    if word in word_class("intensifier"):
        after = sentence.next(i + 1)
        return "object" if after in ("much", "well", "often") or after in word_class("adverb") else None
    if _closed(word):
        return "object"
    if word in word_class("complement"):
        return "determiner" if _known_noun(sentence.next(i + 1)) else None
    if (word, sentence.next(i + 1)) == ("face", "to"):
        return None
    if before in word_class("causative") and word in word_class("bare_verb"):
        return "object"
    if before in word_class("naming"):
        return None
    if _known_noun(word):
        return "determiner"
    if word == NUMBER:
        return None if two_objects else "determiner"
    if two_objects:
        return None
    return _role_by_form(sentence, i, word)


def _known_noun_follows(sentence: Sentence, i: int) -> bool:
    """Whether "on her back." or "in her last year" it is: the word after "her" ends the phrase, or a noun follows."""
    return not sentence.next(i + 1) or _known_noun(sentence.next(i + 1))


def _role_by_form(sentence: Sentence, i: int, word: str) -> str | None:
    following = sentence.tokens[i + 1]
    if following.text[0].isupper() and not sentence.upper and word not in proper_words():
        return None
    if word in word_class("weekday") or word in word_class("bare_verb"):
        return None
    if word.endswith("ing") and len(word) > 4 and word not in word_class("ing_noun"):
        return None
    if word.endswith("ly") and word not in word_class("ly_noun"):
        after = sentence.next(i + 1)
        return "object" if not after or _closed(after) else None
    if word.endswith("ed") and word not in word_class("ed_adjective"):
        return "determiner" if _known_noun(sentence.next(i + 1)) else None
    return "determiner"


def role_of_his(sentence: Sentence, i: int) -> str | None:
    """`determiner` (her) or `possessive` (hers) for the "his" at word `i`; None where both would do.

    At the end, before punctuation or a word of a closed class, and in "a friend of his called", it is the possessive.
    """
    word = sentence.next(i)
    if sentence.tokens[i].clitic or (not word and sentence.after(i) in _QUOTES and sentence.after(i)):
        return None
    if not word:
        return "possessive"
    if word in word_class("determiner") and word not in ("many", "every", "few", "several", "both"):
        return None
    if word in word_class("ambiguous_after_her") or word == NUMBER:
        return "determiner"
    if _closed(word):
        return "possessive"
    if sentence.previous(i) == "of" and (word in word_class("finite_verb") or word.endswith("ed")):
        double = i > 2 and sentence.tokens[i - 2].lower in word_class("friend")
        return "possessive" if double and sentence.tokens[i - 3].lower in word_class("determining") else None
    return "determiner"


def describes_person(sentence: Sentence, first: int, last: int, *, nominal: bool) -> bool:
    """Whether the adjective at words `first` to `last` certainly speaks of a person.

    True before a noun of the class `person`, with up to two known modifiers between; as a predicate of a person
    ("she is very ADJECTIVE, and"), the predicate ending there; and, where `nominal`, in "the ADJECTIVE are".
    """
    word, j = sentence.next(last), last
    for _ in range(3):
        if word in word_class("person"):
            return True
        if word not in word_class("modifier") and word not in proper_words():
            break
        j += 1
        word = sentence.next(j)
    word = sentence.next(last)
    ends = not word or word in word_class("follows_predicate")
    if ends and sentence.after(last) not in _QUOTES - {'"', "”", "\u2019"}:
        return _is_predicate_of_person(sentence, first) or (
            nominal and not word and sentence.previous(first) == "the" and sentence.previous(first - 1) in _OF_THE
        )
    return nominal and sentence.previous(first) == "the" and word in word_class("agree_plural")


_OF_THE = frozenset(("of", "for", "to", "from", "on", "help", "helps", "by"))


def _is_predicate_of_person(sentence: Sentence, i: int) -> bool:
    steps = 0
    while sentence.previous(i) in word_class("degree") and steps < 3:
        i, steps = i - 1, steps + 1
    if not i or sentence.tokens[i].before != " ":
        return False
    before = sentence.tokens[i - 1]
    if before.clitic[1:].lower() in ("s", "re", "m"):
        return before.lower in word_class("person_pronoun")
    if before.lower not in word_class("be"):
        return False
    subject = sentence.previous(i - 1)
    return subject in word_class("person") or subject in word_class("person_pronoun")


def word_class_of(sentence: Sentence, i: int) -> str | None:
    """`adjective` or `noun` for a word that can be both ("Christian"), None where its neighbours do not tell."""
    word, before = sentence.next(i), sentence.previous(i)
    if sentence.tokens[i].clitic:
        return "noun"
    if word in word_class("person") or word in word_class("institution"):
        return "adjective"
    if word and not _closed(word) and word not in word_class("finite_verb"):
        # An unknown word behind an article: "a Christian befriended", "a Christian symbol".
        return None
    if before in word_class("be") or before in word_class("degree"):
        return "noun" if before in ("a", "an") else "adjective"
    return "noun" if before in word_class("determining") else None


def is_verb(sentence: Sentence, i: int, *, plural: bool) -> bool:
    """Whether a noun is a verb ("he nurses a grudge", "to man the pumps"), an interjection, or "man" for mankind."""
    before, word = sentence.previous(i), sentence.next(i)
    takes_object = word in word_class("determiner") or word in word_class("possessive") or word in _OBJECTS
    if before in word_class("subject_pronoun") and not (before == "who" and not takes_object):
        return not (plural and before == "they") or takes_object
    if before == "to" or before in word_class("modal"):
        return takes_object and not plural
    token = sentence.tokens[i]
    if token.lower in ("man", "woman") and (token.initial or before in word_class("preposition") or before in _BE_ARE):
        # "Man is mortal", "the fall of man": mankind.
        return True
    return token.initial and token.lower == "boy" and sentence.after(i) in ("!", ",") and not word


_BE_ARE = frozenset(("is", "was", "are", "were", "that", "and", "or"))
_OBJECTS = frozenset(("him", "them", "it", "us", "me", "her"))
