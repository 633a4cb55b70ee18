"""The row schema of every set, and the check that names all faults of a set at once.

A row is `prompt` and `completion` (text, or chat messages), `images` (a list; absent or empty for text), and for bias
sets `bias_type`, `polarity`, `pair_id`, `source` and `source_id`. The names are those that TRL's trainers take. Further
columns (`kind`, `rejected`, ...) are kept as they are.
"""

import difflib
import itertools
import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from datasets import Dataset

from biasunlearn_trainer.data_builders.images import image_fault, image_key, undecoded

logger = logging.getLogger(__name__)

BIAS_TYPES = (
    "age",
    "disability",
    "gender",
    "nationality",
    "physical_appearance",
    "profession",
    "race",
    "religion",
    "sexual_orientation",
    "socioeconomic",
    "other",
)
POLARITIES = ("stereotype", "anti_stereotype", "unrelated", "neutral")
REQUIRED_COLUMNS = ("prompt", "completion")
COLUMNS = (*REQUIRED_COLUMNS, "images", "bias_type", "polarity", "pair_id", "source", "source_id")
ROLES = ("system", "user", "assistant", "tool")

# What other sets call these columns: a guess for the error message, never a silent renaming.
SYNONYMS = {
    "prompt": ("question", "instruction", "input", "query", "text", "context", "user"),
    "completion": ("answer", "response", "output", "target", "label", "reply", "chosen", "assistant"),
}
MAX_SHOWN = 20
BATCH_SIZE = 256
DECODING_THREADS = 4

# A row and its place in its file: ("line 3", {...}).
Record = tuple[str, dict[str, Any]]


class InvalidDataset(ValueError):
    """A set that cannot be used.

    Attributes:
        name: The set's name.
        faults: The first `MAX_SHOWN` faults, each with its row.
        num_faults: The count of all faults.
    """

    def __init__(self, name: str, faults: list[str], num_faults: int):
        self.name, self.faults, self.num_faults = name, faults, num_faults
        lines = [f"{name}: {num_faults} fault{'s' if num_faults > 1 else ''} (rows are counted from 1)."]
        lines += [f"  - {fault}" for fault in faults]
        if num_faults > len(faults):
            lines.append(f"  - ... and {num_faults - len(faults)} more")
        super().__init__("\n".join(lines))


class Faults:
    """Collects the faults of one set: the texts of the first `MAX_SHOWN`, the count of all."""

    def __init__(self, name: str):
        self.name, self.texts, self.count = name, [], 0

    def add(self, text: str, where: str | None = None) -> None:
        """Notes one fault, at `where` (for example "row 3") or of the whole set."""
        self.count += 1
        if len(self.texts) < MAX_SHOWN:
            self.texts.append(f"{where}: {text}" if where else text)

    def raise_if_any(self) -> None:
        """Raises `InvalidDataset` if a fault was noted."""
        if self.count:
            raise InvalidDataset(self.name, self.texts, self.count)


def nearest(value: str, valid: Iterable[str], cutoff: float = 0.5) -> str | None:
    """Returns the valid name nearest to `value`, or None where none is near.

    >>> nearest("Gendre", BIAS_TYPES)
    'gender'
    """
    close = difflib.get_close_matches(str(value).lower(), list(valid), n=1, cutoff=cutoff)
    return close[0] if close else None


def check_columns(columns: Iterable[str], faults: Faults) -> None:
    """Notes missing columns with the nearest ones found; warns of an optional column that looks misspelt."""
    columns = list(columns)
    for needed in REQUIRED_COLUMNS:
        if needed not in columns:
            near = [name for name in columns if name.lower() in SYNONYMS[needed]]
            near = near or difflib.get_close_matches(needed, columns, n=2, cutoff=0.5)
            hint = f"; nearest: {', '.join(near)} (rename it to `{needed}`)" if near else ""
            faults.add(f"no column `{needed}`; columns found: {', '.join(columns) or 'none'}{hint}")
    for name in set(columns) - set(COLUMNS):
        meant = nearest(name, COLUMNS, cutoff=0.8)
        if meant and meant not in columns:
            logger.warning("%s: column `%s` is not used; did you mean `%s`?", faults.name, name, meant)


def text_fault(value: Any, column: str) -> str | None:
    """Returns what is wrong with a prompt or a completion, or None."""
    if isinstance(value, str):
        empty = column == "completion" and not value.strip()
        return "`completion` is empty; write the answer that the row is about" if empty else None
    if value is None:
        return f"`{column}` is missing (null)"
    if not isinstance(value, list):
        return f"`{column}` must be text or a list of chat messages, got {type(value).__name__} {value!r:.60}"
    if not value:
        return f"`{column}` is an empty list of messages"
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            return f"`{column}` has a message without a role of {', '.join(ROLES)}: {message!r:.80}"
        if not isinstance(message.get("content"), str | list):
            return f"`{column}` has a message whose `content` is neither text nor a list of parts: {message!r:.80}"
    if column == "completion" and not any(_content_text(message["content"]).strip() for message in value):
        return "`completion` is empty; write the answer that the row is about"
    return None


def _content_text(content: str | list) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if isinstance(part, dict))


def _has_half_character(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def row_faults(row: dict) -> Iterator[str]:
    """Yields what is wrong with the texts and labels of one row; columns that it lacks are not looked at."""
    for column, value in row.items():
        if isinstance(value, str) and not value.isascii() and _has_half_character(value):
            yield f"`{column}` holds half a character (a lone surrogate), which no file in UTF-8 can: {value!r:.60}"
    forms = set()
    for column in REQUIRED_COLUMNS:
        if column in row:
            fault = text_fault(row[column], column)
            if fault:
                yield fault
            else:
                forms.add(type(row[column]))
    if len(forms) > 1:
        yield "`prompt` and `completion` must both be text or both be chat messages"
    for column, valid in (("bias_type", BIAS_TYPES), ("polarity", POLARITIES)):
        value = row.get(column)
        if value not in (None, "", *valid):
            meant = nearest(value, valid)
            hint = f"did you mean `{meant}`? " if meant else ""
            yield f"unknown {column} {value!r}; {hint}valid: {', '.join(valid)}"


def check_rows(rows: Iterable[Record], faults: Faults, *, check_images: bool = True) -> int:
    """Notes the faults of all rows.

    Args:
        rows: Pairs of a place ("row 3") and a row with undecoded images (paths, `{"bytes", "path"}`, or PIL images).
        faults: Where they are noted.
        check_images: Decode every picture once; a picture that many rows share is decoded once.

    Returns:
        The number of rows.
    """
    num_rows, first_form, seen = 0, None, {}
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH_SIZE)):
        for where, row in batch:
            num_rows += 1
            for fault in row_faults(row):
                faults.add(fault, where)
            form = {str: "text", list: "chat messages"}.get(type(row.get("prompt")))
            first_form = first_form or form
            if form and form != first_form:
                faults.add(f"`prompt` is {form}, but {first_form} in the rows before; one set holds one form", where)
        if check_images:
            _check_image_batch(batch, seen, faults)
    if not num_rows:
        faults.add("it has no rows")
    return num_rows


def _check_image_batch(batch: list[Record], seen: dict, faults: Faults) -> None:
    keyed = [(where, image_key(image), image) for where, row in batch for image in row.get("images") or []]
    unseen = {key: image for _, key, image in keyed if key not in seen}
    if unseen:
        with ThreadPoolExecutor(DECODING_THREADS) as pool:
            seen.update(zip(unseen, pool.map(image_fault, unseen.values()), strict=True))
    for where, key, _ in keyed:
        if seen[key]:
            faults.add(seen[key], where)


def validate_rows(dataset: Dataset, name: str, *, check_images: bool = True) -> None:
    """Checks a whole set and raises one error that lists every fault.

    Args:
        dataset: The set; `images`, if there, is a list of `datasets.Image`.
        name: What the error calls it, for example "forget" or a path.
        check_images: Decode every picture once (about 5 ms for a photograph of 512 x 512 pixels).

    Raises:
        InvalidDataset: No `prompt` or `completion` column, no rows, an empty completion, an unknown `bias_type` or
            `polarity`, mixed text and chat rows, a picture that cannot be read. The first 20 are spelt out.
    """
    faults = Faults(name)
    check_dataset(dataset, faults, check_images=check_images)
    faults.raise_if_any()


def check_dataset(dataset: Dataset, faults: Faults, *, check_images: bool = True) -> None:
    """Notes the faults of a whole set, as `validate_rows` does, without raising."""
    check_columns(dataset.column_names, faults)
    rows = ((f"row {number}", row) for number, row in enumerate(undecoded(dataset), start=1))
    check_rows(rows, faults, check_images=check_images)
