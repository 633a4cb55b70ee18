"""The stage of a build: every row that can be swapped, and its counterpart behind it."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from biasunlearn_trainer.data_builders.counterfactual.swap import Swap, apply, swap_to
from biasunlearn_trainer.data_builders.counterfactual.words import BIAS_TYPES, table, words_version
from biasunlearn_trainer.data_builders.stages import Reject

POLARITIES = ("stereotype", "anti_stereotype", "unrelated", "neutral")
OPPOSITE = {"stereotype": "anti_stereotype", "anti_stereotype": "stereotype"}
# A counterpart keeps these columns of its row (`group` is what the build deals to parts as a whole); any other one (an
# answer, a fact) speaks of the people that were there.
KEPT = ("group", "kind", "bias_type", "polarity", "pair_id", "source", "source_id", "prompt", "completion")


class Counterfactuals:
    """Yields a pair for each row whose groups can be exchanged: the row, then its counterfactual; rejects the others.

    A row's `bias_type` decides which words are swapped. A row without one (or with `other`) gives a pair for every
    bias type that it can be swapped in, each with its own `pair_id`. Where a type has more than two groups, the group
    that has been yielded least so far is taken, so that the rows are balanced over groups.

    Columns of both rows: `pair_id` (a digest of the row's texts and bias type), `bias_type`, `polarity` (the
    counterfactual of a stereotype is an anti-stereotype and the reverse, all else stays), `source` and `source_id` (of
    the row; where it has none, "text" and the row's number), `demographic` (the group of the first word
    that was swapped) and `counterfactual` (false, true). The counterfactual of a stereotype has the stereotype's
    completion in `rejected`, where both follow the same prompt.

    Args:
        bias_types: those to swap, by default all; rows of another one are rejected.
        to: the only group to swap to, for rows that name one group; needs a single bias type.
        polarity: of rows that have none.

    Attributes:
        settings: what changes the result, the version of the word files among it.
        counts: rows yielded by (bias type, demographic group), of the last run.

    Raises:
        ValueError: an unknown bias type, group or polarity.
    """

    name = "counterfactual"

    def __init__(self, bias_types: list[str] | None = None, to: str | None = None, polarity: str = "neutral"):
        """Checks names against the tables."""
        self.bias_types, self.to, self.polarity = tuple(bias_types or BIAS_TYPES), to, polarity
        if polarity not in POLARITIES:
            raise ValueError(f"unknown polarity {polarity!r}; valid: {', '.join(POLARITIES)}")
        if to is not None and len(self.bias_types) > 1:
            raise ValueError(f"to: {to!r} is a group of one bias type; set `bias_types` to that one.")
        for bias_type in self.bias_types:
            groups = table(bias_type).groups
            if to is not None and to not in groups:
                raise ValueError(f"{bias_type} has no group {to!r}; groups: {', '.join(groups)}.")
        self.settings = {"bias_types": list(self.bias_types), "to": to, "polarity": polarity, "words": words_version()}
        self.counts: Counter[tuple[str, str]] = Counter()

    def run(self, rows: Iterable[dict]) -> Iterator[dict | Reject]:
        """Yields two rows or more for an accepted row, one `Reject` for another."""
        self.counts.clear()
        for number, row in enumerate(rows, start=1):
            yield from self._pairs(row, number)

    def _pairs(self, row: dict, number: int) -> Iterator[dict | Reject]:
        texts = _texts(row)
        if row.get("images"):
            yield Reject(row, "picture", "a counterfactual text would not fit the picture")
            return
        if texts is None:
            yield Reject(row, "no_plain_text", "prompt or completion is neither text nor messages of text")
            return
        given = row.get("bias_type")
        types = self.bias_types if given in (None, "", "other") else [name for name in self.bias_types if name == given]
        joined = ("" if isinstance(row["completion"], str) else "\n").join(texts)
        refused = []
        for bias_type in types:
            swapped = swap_to(joined, bias_type, lambda first, bias_type=bias_type: self._order(bias_type))
            changed = _split(swapped, texts, joined)
            if changed is None:
                refused.append((swapped.reason or "not_reversible", f"{bias_type}: {swapped.detail}"))
            else:
                yield from self._pair(row, number, bias_type, swapped, changed)
        if len(refused) == len(types):
            # What stood in the way of a word that was there says more than that other words were not there.
            yield Reject(row, *min(refused, key=lambda r: r[0] == "no_term", default=("other_bias_type", str(given))))

    def _order(self, bias_type: str) -> Sequence[str]:
        if self.to is not None:
            return (self.to,)
        return sorted(table(bias_type).groups, key=lambda group: self.counts[bias_type, group])

    def _pair(self, row: dict, number: int, bias_type: str, swapped: Swap, changed: list[str]) -> Iterator[dict]:
        polarity = row.get("polarity") or self.polarity
        content = repr((bias_type, row.get("source"), row.get("source_id"), row.get("prompt"), row["completion"]))
        ids = {
            "bias_type": bias_type,
            "pair_id": f"counterfactual-{hashlib.blake2b(content.encode(), digest_size=8).hexdigest()}",
            "source": row.get("source") or "text",
            "source_id": row.get("source_id") or str(number),
        }
        first, other = swapped.groups
        self.counts.update(((bias_type, first), (bias_type, other)))
        yield {**row, **ids, "polarity": polarity, "demographic": first, "counterfactual": False}
        kept = {name: row[name] for name in KEPT if name in row}
        labels = {"polarity": OPPOSITE.get(polarity, polarity), "demographic": other, "counterfactual": True}
        other_row = {**kept, **ids, **labels, **_with_texts(row, iter(changed))}
        if polarity == "stereotype" and other_row["prompt"] == row["prompt"]:
            other_row["rejected"] = row["completion"]
        yield other_row


def _texts(row: dict) -> list[str] | None:
    """The texts of prompt and completion in order; None where one is no plain text."""
    texts: list[Any] = []
    for column in ("prompt", "completion"):
        value = row.get(column)
        texts += [value] if not isinstance(value, list) else [message.get("content") for message in value]
    return texts if all(isinstance(text, str) for text in texts) else None


def _with_texts(row: dict, texts: Iterator[str]) -> dict:
    """Prompt and completion of a row with other texts, in the form of the row."""
    return {
        column: [{**message, "content": next(texts)} for message in row[column]]
        if isinstance(row[column], list)
        else next(texts)
        for column in ("prompt", "completion")
    }


def _split(swapped: Swap, texts: list[str], joined: str) -> list[str] | None:
    """The swapped texts; None for a refusal, or where a word lies across two of them."""
    if swapped.text is None:
        return None
    gap = (len(joined) - sum(map(len, texts))) // max(len(texts) - 1, 1)
    changed, start, edits = [], 0, list(swapped.edits)
    for text in texts:
        end = start + len(text)
        inside = list(itertools.takewhile(lambda edit, end=end: edit[1] <= end, edits))
        del edits[: len(inside)]
        if edits and edits[0][0] < end:
            return None
        changed.append(apply(text, ((a - start, b - start, new) for a, b, new in inside)))
        start = end + gap
    return changed
