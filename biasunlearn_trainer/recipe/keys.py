"""Reads what a recipe and a command line set: keys and values with the place where they stand.

PyYAML takes the last of two equal keys and argparse forgets lines; here a repeated key is a fault, and every key knows
its line.
"""

import dataclasses
import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml


@dataclasses.dataclass(frozen=True)
class Entry:
    """One key that a recipe or a command line sets.

    Attributes:
        key: the field's name as written, hyphens read as underscores on a command line.
        value: what YAML made of it; on a command line a string, or a list of strings.
        where: `FILE:LINE` or `command line`, the start of every message about it.
        is_text: True on a command line, where every value is a string whatever it means.
    """

    key: str
    value: Any
    where: str
    is_text: bool = False


def read_yaml(path: str | Path) -> tuple[list[Entry], list[str]]:
    """Reads a flat YAML mapping, one entry a key, in the order of the file.

    Args:
        path: the recipe.

    Returns:
        The entries and the faults: a missing file, broken YAML, a document that is no mapping, a key that is set twice.
    """
    path = Path(path)
    if not path.is_file():
        siblings = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        return [], [f"{path}: no such recipe{nearest(path.name, siblings)}. Give the path of a YAML file."]
    loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            return [], [f"{path}: expected `key: value` lines, got {'nothing' if root is None else root.id}."]
        pairs = [
            (loader.construct_object(k, deep=True), loader.construct_object(v, deep=True), k) for k, v in root.value
        ]
    except yaml.YAMLError as err:
        return [], [f"{path}: this is not valid YAML: {err}"]
    finally:
        loader.dispose()
    return without_duplicates([Entry(str(k), v, f"{path}:{node.start_mark.line + 1}") for k, v, node in pairs])


def read_overrides(arguments: Iterable[str]) -> tuple[list[Entry], list[str]]:
    """Reads `--key value`, `--key=value`, `--flag`, `--no_flag` and `--list a b` from a command line.

    Args:
        arguments: the words after the recipe's path.

    Returns:
        The entries, whose values are strings (True for a bare flag, lists for several words), and the faults.
    """
    entries: list[Entry] = []
    faults: list[str] = []
    for word in arguments:
        if word.startswith("--") and len(word) > 2:
            key, equals, value = word[2:].partition("=")
            entries.append(Entry(key.replace("-", "_"), [value] if equals else [], "command line", is_text=True))
        elif entries:
            entries[-1].value.append(word)
        else:
            faults.append(f"command line: got {word!r}, expected --key value.")
    entries = [dataclasses.replace(e, value=_unwrap(e.value)) for e in entries]
    entries, duplicates = without_duplicates(entries)
    return entries, faults + duplicates


def _unwrap(words: list[str]) -> Any:
    return True if not words else words[0] if len(words) == 1 else words


def without_duplicates(entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """Splits entries into the first of each key and a fault for every later one."""
    first: dict[str, Entry] = {}
    faults = []
    for entry in entries:
        if entry.key in first:
            faults.append(f"{entry.where}: `{entry.key}` is set twice, first at {first[entry.key].where}. Keep one.")
        first.setdefault(entry.key, entry)
    return list(first.values()), faults


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Returns ` (did you mean X?)` for the closest candidate, or nothing.

    >>> nearest("learning_rat", ["learning_rate", "seed"])
    ' (did you mean `learning_rate`?)'
    """
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.6)
    return f" (did you mean `{close[0]}`?)" if close and close[0] != word else ""
