"""What a set or a model is called in public: a Hub id as it is, a path of this machine by its last part alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biasunlearn_trainer.recipe.config import TESTBED_PREFIX

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(/[\w.-]+)?")  # a set may name its configuration behind the id
DATA_FILE = re.compile(r"\.(jsonl?|csv|tsv|parquet|txt|ya?ml)$", re.IGNORECASE)
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])(?:/(?=[^\s/])|~/|[A-Za-z]:[\\/])[^\s'\"`,;:)\]}>]+")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9_]{20,}")


def is_hub_id(source: str | None) -> bool:
    """Whether a name is one of the Hub's, OWNER/NAME, and no file or folder here.

    >>> is_hub_id("llava-hf/llava-1.5-7b-hf"), is_hub_id("/models/llava"), is_hub_id("data/forget.jsonl")
    (True, False, False)
    """
    if not source or not HUB_ID.fullmatch(source) or DATA_FILE.search(source):
        return False
    return not Path(source).exists()


def public_name(source: str | None) -> str | None:
    """A model's or set's name without the path to it.

    >>> public_name("/home/me/models/llama-3-8b"), public_name("org/model"), public_name("data/forget.jsonl")
    ('llama-3-8b', 'org/model', 'forget.jsonl')
    """
    if not source or is_hub_id(source):
        return source
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1]


def without_paths(text: str) -> str:
    """A text in which absolute paths are their last part and tokens of the Hub are gone.

    >>> without_paths("Resolved from /home/me/recipes/demo.yaml.")
    'Resolved from demo.yaml.'
    """
    return ABSOLUTE_PATH.sub(lambda found: public_name(found.group()) or "", TOKEN.sub("(a token was here)", text))


def portable(value: Any) -> Any:
    """A value of a recipe or a result as `without_paths` leaves it; lists and mappings value by value."""
    if isinstance(value, Mapping):
        return {key: portable(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [portable(part) for part in value]
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")  # a task: NAME=PATH
    if os.path.isabs(os.path.expanduser(path)) and path not in ("/", "~"):
        return without_paths(name) + equals + (public_name(path) or "")
    return without_paths(value)


def in_testbed(source: str, testbed: str | None) -> str | None:
    """`testbed:NAME` for what lies in a testbed's folder, None for anything else.

    Args:
        source: a path.
        testbed: the folder of the run's testbed; None where it has none.
    """
    if testbed and Path(source).parent == Path(testbed):
        return TESTBED_PREFIX + Path(source).name
    return None
