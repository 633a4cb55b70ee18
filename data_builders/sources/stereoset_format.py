"""StereoSet's files (Nadeem, Bethke and Reddy 2021): reading all the forms it is published in, and writing its own.

Read are the original JSON (`{"version", "data": {"intrasentence": [...], "intersentence": [...]}}`, or one list of such
items; also gzipped) and the CSV of the public development set, whose `choices` column is a list as numpy prints
it, always in the order stereotype, anti-stereotype, unrelated. A sentence of the intrasentence task is its context
with BLANK filled in.
"""

import ast
import gzip
import hashlib
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biasunlearn_trainer.data_builders.images import nearest_files
from biasunlearn_trainer.data_builders.schema import BIAS_TYPES, Faults, nearest
from biasunlearn_trainer.data_builders.sources.records import data_suffix, read_records

logger = logging.getLogger(__name__)

TASKS = ("intrasentence", "intersentence")
GOLD_LABELS = {"stereotype": "stereotype", "anti-stereotype": "anti_stereotype", "unrelated": "unrelated"}
SENTENCE_POLARITIES = tuple(GOLD_LABELS.values())
CSV_COLUMNS = ("prompt", "choices", "bias_type", "target")

# The choices are whole words of the published sentences, so letters that touch BLANK belong to what is replaced: the
# grandfather who "BLANKed the grandchildren", with the choice "protected", "protected the grandchildren".
BLANK = re.compile(r"\w*BLANK\w*")
# Contexts published with two BLANKs, by the start of their SHA-256: two of the development set (targets Brahmin and
# performing artist), one of the training part (Europe). Where the sentences are published too, both hold
# the same word.
PUBLISHED_WITH_TWO_BLANKS = frozenset({"fe09d1904aafa466", "7c2138459879a3a7", "a48e816fa3439e43"})

_LITERAL = r"""(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
_NUMPY_LIST = re.compile(rf"\[\s*(?:{_LITERAL}\s*)*\]")


@dataclass(frozen=True)
class StereoSetItem:
    """One item: three sentences about a target term.

    Attributes:
        id: as published, or a hash of the content where the file has none (CSV).
        target: the term that the stereotype is about.
        bias_type: one of the schema's; StereoSet has gender, profession, race and religion.
        task: `intrasentence` or `intersentence`.
        context: with BLANK (intrasentence), or the sentence before (intersentence).
        stereotype: a whole sentence, as the two that follow.
        anti_stereotype: see there.
        unrelated: see there.
    """

    id: str
    target: str
    bias_type: str
    task: str
    context: str
    stereotype: str
    anti_stereotype: str
    unrelated: str


def read_stereoset(path: str | os.PathLike) -> list[StereoSetItem]:
    """Read a StereoSet file, or all of a folder.

    Args:
        path: a .csv, .json or .json.gz file; or a folder, of which the CSV files are read, or the JSON files where
            there are none.

    Returns:
        The items in the order of the files; an item that is there twice is kept once.

    Raises:
        FileNotFoundError: where nothing is there, or the folder holds no such file.
        InvalidDataset: listing all faults with file and row: a BLANK that is missing or there twice, not three
            sentences, missing or double labels, labels that are swapped against the annotators', an unknown bias
            type.
    """
    path = Path(path).expanduser()
    faults, items = Faults(str(path)), []
    for file in _files(path):
        read = _read_csv if data_suffix(file) == ".csv" else _read_json
        items += read(file, faults)
    faults.raise_if_any()
    return _without_repeats(items, path)


def write_json(items: Iterable[StereoSetItem], path: str | os.PathLike) -> None:
    """Write items in StereoSet's own JSON schema, which its authors' scorer and other tools read; .gz compresses.

    There are no annotators' labels in it, only gold labels. The file appears whole or not at all.
    """
    path = Path(path)
    data: dict[str, list] = {task: [] for task in TASKS}
    for item in items:
        sentences = [
            {"sentence": getattr(item, polarity), "id": f"{item.id}-{label}", "labels": [], "gold_label": label}
            for label, polarity in GOLD_LABELS.items()
        ]
        common = {name: getattr(item, name) for name in ("id", "target", "bias_type", "context")}
        data[item.task].append({**common, "sentences": sentences})
    text = json.dumps({"version": "1.0", "data": data}, ensure_ascii=False, indent=1)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(gzip.compress(text.encode(), mtime=0) if path.suffix == ".gz" else text.encode())
    os.replace(partial, path)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        if data_suffix(path) not in (".csv", ".json"):
            raise ValueError(f"{path} has no known format; expected .csv, .json or .json.gz.")
        return [path]
    if not path.is_dir():
        near = ", ".join(nearest_files(path))
        raise FileNotFoundError(f"No StereoSet at {path}" + (f"; nearest there: {near}." if near else "."))
    for suffix in (".csv", ".json"):
        files = sorted(file for file in path.iterdir() if file.is_file() and data_suffix(file) == suffix)
        if files:
            return files
    raise FileNotFoundError(f"{path} holds no StereoSet file: expected .csv, .json or .json.gz.")


def _read_csv(file: Path, faults: Faults) -> list[StereoSetItem]:
    records = read_records(file, faults)
    if not records:
        faults.add("it has no rows", file.name)
        return []
    missing = [column for column in CSV_COLUMNS if column not in records[0][1]]
    if missing:
        faults.add(f"columns {', '.join(missing)} are missing; expected {', '.join(CSV_COLUMNS)}", file.name)
        return []
    task = _task_of(file, [row["prompt"] for _, row in records])
    items = []
    for where, row in records:
        where = f"{file.name}, {where}"
        choices = _parse_choices(row["choices"])
        if choices is None or len(choices) != 3:
            got = "no list" if choices is None else f"{len(choices)}"
            faults.add(f"`choices` must be a list of three quoted sentences, got {got}: {row['choices']!r:.120}", where)
            continue
        context = row["prompt"]
        if task == "intrasentence":
            choices = [BLANK.sub(lambda _, word=word: word, context) for word in choices]
        digest = hashlib.sha256(json.dumps([task, context, *choices]).encode()).hexdigest()[:32]
        item = StereoSetItem(digest, row["target"] or "", row["bias_type"] or "", task, context, *choices)
        _check(item, where, faults)
        items.append(item)
    return items


def _task_of(file: Path, contexts: Sequence[str]) -> str:
    """The task of a CSV file: what its name says, or what most of its rows look like."""
    named = [task for task in TASKS if task in file.name.lower()]
    if len(named) == 1:
        return named[0]
    return TASKS[0] if 2 * sum("BLANK" in context for context in contexts) > len(contexts) else TASKS[1]


def _parse_choices(text: str) -> list[str] | None:
    """The strings of a list as numpy prints it, quoted like Python's but without commas; None if it is no such list."""
    if not _NUMPY_LIST.fullmatch((text or "").strip()):
        return None
    # Not the whole list at once: Python would join strings that no comma parts.
    return [ast.literal_eval(literal) for literal in re.findall(_LITERAL, text)]


def _read_json(file: Path, faults: Faults) -> list[StereoSetItem]:
    try:
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        content = json.loads(raw)
    except (OSError, EOFError, ValueError) as err:
        faults.add(f"it cannot be read as JSON: {err}", file.name)
        return []
    parts = content.get("data") if isinstance(content, dict) else {_list_task(content): content}
    expected = isinstance(parts, dict) and set(parts) <= set(TASKS)
    if not expected or not all(isinstance(records, list) for records in parts.values()):
        faults.add('expected {"data": {"intrasentence": [...], "intersentence": [...]}} or a list of items', file.name)
        return []
    items = []
    for task, records in parts.items():
        for number, record in enumerate(records, start=1):
            item = _json_item(record, task, f"{file.name}, {task} {number}", faults)
            if item:
                _check(item, f"{file.name}, {task} {number}", faults)
                items.append(item)
    if not items and not faults.count:
        faults.add("it has no items", file.name)
    return items


def _list_task(records: Any) -> str:
    contexts = [str(r.get("context", "")) for r in records if isinstance(r, dict)] if isinstance(records, list) else []
    return TASKS[0] if 2 * sum("BLANK" in context for context in contexts) > len(contexts) else TASKS[1]


def _json_item(record: Any, task: str, where: str, faults: Faults) -> StereoSetItem | None:
    if not isinstance(record, dict):
        faults.add(f"expected an item, got {type(record).__name__}", where)
        return None
    sentences = record.get("sentences")
    if sentences is None and isinstance(record.get("data"), dict):
        # BiasEdit's tracing files: {"data": {label: {"sentence", "id"}}}
        sentences = [{**sentence, "gold_label": label} for label, sentence in record["data"].items()]
    missing = [name for name in ("id", "target", "bias_type", "context") if not isinstance(record.get(name), str)]
    if missing or not isinstance(sentences, list):
        faults.add(f"{', '.join(missing) or 'sentences'} missing", where)
        return None
    if len(sentences) != 3 or not all(isinstance(sentence, dict) for sentence in sentences):
        faults.add(f"expected three sentences, got {len(sentences)}: {sentences!r:.120}", where)
        return None
    labels = [sentence.get("gold_label") for sentence in sentences]
    if sorted(map(str, labels)) != sorted(GOLD_LABELS):
        faults.add(f"expected the gold labels {', '.join(GOLD_LABELS)} once each, got {labels}", where)
        return None
    if _swapped(sentences):
        faults.add("stereotype and anti-stereotype are swapped against the annotators' labels", where)
    texts = {GOLD_LABELS[sentence["gold_label"]]: str(sentence.get("sentence") or "") for sentence in sentences}
    return StereoSetItem(record["id"], record["target"], record["bias_type"], task, record["context"], **texts)


def _swapped(sentences: Sequence[Mapping[str, Any]]) -> bool:
    """Whether most annotators call the stereotype an anti-stereotype and the other way round."""
    majority = {}
    for sentence in sentences:
        votes = Counter(label.get("label") for label in sentence.get("labels") or [])
        majority[sentence["gold_label"]] = votes.most_common(1)[0][0] if votes else None
    return majority["stereotype"] == "anti-stereotype" and majority["anti-stereotype"] == "stereotype"


def _check(item: StereoSetItem, where: str, faults: Faults) -> None:
    """Note what is wrong with the context, the texts and the bias type of an item."""
    blanks = len(BLANK.findall(item.context)) if item.task == "intrasentence" else 1
    if blanks == 0:
        faults.add(f"BLANK is missing in {item.context!r:.120}", where)
    digest = hashlib.sha256(item.context.encode()).hexdigest()[:16]
    if blanks > 1 and digest not in PUBLISHED_WITH_TWO_BLANKS:
        faults.add(f"BLANK stands {blanks} times, expected once, in {item.context!r:.120}", where)
    for name in ("target", "context", *SENTENCE_POLARITIES):
        if not getattr(item, name).strip():
            faults.add(f"{name} is empty", where)
    if item.bias_type not in BIAS_TYPES:
        faults.add(unknown_name("bias_type", item.bias_type, BIAS_TYPES), where)


def unknown_name(what: str, value: str, valid: Sequence[str]) -> str:
    """The sentence about an unknown name: the nearest valid one, and all of them."""
    near = nearest(value, valid)
    return f"unknown {what} {value!r}; " + (f"did you mean {near!r}? " if near else "") + f"valid: {', '.join(valid)}"


def _without_repeats(items: list[StereoSetItem], path: Path) -> list[StereoSetItem]:
    kept = list(dict.fromkeys(items))
    if len(kept) < len(items):
        logger.warning("%s: %d repeated items are kept once.", path, len(items) - len(kept))
    return kept
