"""How options and answers say that something cannot be known."""

# How BBQ's unknown options are worded, whichever of them an item has; a phrase may go on ("info", "information").
UNKNOWN_PHRASES = (
    "unknown",
    "undetermined",
    "cannot be determined",
    "can't be determined",
    "cannot answer",
    "can't answer",
    "cannot be known",
    "not answerable",
    "not known",
    "not enough info",
)


def says_unknown(text: str) -> bool:
    """Whether a text says, in one of BBQ's wordings, that something cannot be known.

    >>> says_unknown("Cannot be determined"), says_unknown("Not enough information"), says_unknown("The 24 year old")
    (True, True, False)
    """
    plain = text.casefold().replace("\u2019", "'")
    return any(phrase in plain for phrase in UNKNOWN_PHRASES)
