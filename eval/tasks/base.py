"""What every task is: rows to put to a model, and metrics made of the answers."""

from __future__ import annotations

import abc
import random
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from biasunlearn_trainer.eval.metrics import seed_from_name
from biasunlearn_trainer.eval.schema import TaskResult

if TYPE_CHECKING:
    from biasunlearn_trainer.eval.scoring import Scorer

Item = dict[str, Any]


class Task(abc.ABC):
    """One measurement of a model, in two halves: `run` asks the model, `summarise` is pure.

    Args:
        name: key of the task in results, `NAME` or `NAME@LABEL`; it also seeds the intervals.
        path: the task's data, a file or a folder.
        limit: measure at most this many items, drawn evenly over the groups of the data; None measures all.

    Attributes:
        rows: what is put to the model, in the schema of the rows. An item's `index` is the place of its row in here.
        append_eos: whether completions are scored with an EOS behind them; None leaves it to the scorer, which knows
            how the model was trained.
    """

    append_eos: ClassVar[bool | None] = None

    def __init__(self, name: str, path: str, limit: int | None = None):
        if limit is not None and limit < 1:
            raise ValueError(f"limit must be at least 1 item, got {limit}. Leave it out to measure all items.")
        self.name = name
        self.path = path
        self.rows: Sequence[Mapping[str, Any]] = self.load_rows(path, limit)

    @abc.abstractmethod
    def load_rows(self, path: str, limit: int | None) -> Sequence[Mapping[str, Any]]:
        """Read the task's data, cut to the limit."""

    @abc.abstractmethod
    def run(self, scorer: Scorer, answers: bool = False) -> list[Item]:
        """Put the rows to the model.

        Args:
            scorer: around the model.
            answers: also generate the model's answer where the scores do not tell it already, for case studies.

        Returns:
            One record per item, of values that JSON can hold; the same on every process.
        """

    @abc.abstractmethod
    def summarise(self, items: Sequence[Item], baseline: Sequence[Item] | None = None) -> TaskResult:
        """Make metrics of the records.

        Args:
            items: what `run` returned.
            baseline: the records of the model before unlearning on the same rows; without it, metrics that compare with
                that model (localities) are left out.
        """


def draw_evenly(groups: Sequence[Hashable], limit: int | None, name: str) -> list[int]:
    """Choose items so that every group gets its turn, seeded by the task's name.

    Args:
        groups: the group of each item.
        limit: how many items to choose at most; None takes all.
        name: of the task.

    Returns:
        The chosen positions, ascending.

    Example:
        >>> groups = ["common"] * 90 + ["rare"] * 10
        >>> [sum(groups[i] == group for i in draw_evenly(groups, 12, "demo")) for group in ("common", "rare")]
        [6, 6]
    """
    if limit is None or limit >= len(groups):
        return list(range(len(groups)))
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(groups):
        members.setdefault(group, []).append(position)
    turns = []
    for order, positions in enumerate(members.values()):
        random.Random(f"{seed_from_name(name)}/{order}").shuffle(positions)
        turns += [(turn, order, position) for turn, position in enumerate(positions)]
    return sorted(position for _, _, position in sorted(turns)[:limit])


def matching_baseline(items: Sequence[Item], baseline: Sequence[Item], name: str) -> list[Item]:
    """The baseline's record of every item, in the order of the items.

    Raises:
        ValueError: where an item has none: the baseline was measured on other data or with another limit.
    """
    by_index = {item["index"]: item for item in baseline}
    missing = [item["index"] for item in items if item["index"] not in by_index]
    if missing:
        raise ValueError(
            f"{name}: the baseline lacks {len(missing)} of {len(items)} items (first: index {missing[0]}). Measure the "
            "model before unlearning on the same data with the same limit."
        )
    return [by_index[item["index"]] for item in items]


def plain_text(value: str | Iterable[Mapping[str, Any]] | None) -> str | None:
    """A prompt or completion as plain text; of chat messages, the text parts line by line."""
    if value is None or isinstance(value, str):
        return value if value is None else value.strip()
    lines = []
    for message in value:
        content = message["content"]
        parts = [{"text": content}] if isinstance(content, str) else content
        lines += [part["text"] for part in parts if part.get("text")]
    return "\n".join(lines)
