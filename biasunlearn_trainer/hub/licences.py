"""Under which licences the rows stand that a model was trained and measured on, as far as it is known here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from biasunlearn_trainer.data_builders.catalogue import SOURCES

MADE_UP = {"title": "made up by biasunlearn_trainer", "licence": "Apache-2.0"}
STEREOSET_WORLD = [
    {"title": SOURCES["stereoset"].title, "licence": SOURCES["stereoset"].licence, "url": SOURCES["stereoset"].url},
    {"title": "WikiText-2 (Merity et al. 2016)", "licence": "CC BY-SA 3.0"},
]
BENCHMARKS = {
    "planted": ("the planted world", "Apache-2.0", ""),
    "entities": ("the planted people", "Apache-2.0", ""),
    "mllmu_bench": ("MLLMU-Bench (Liu et al. 2024)", None, "https://huggingface.co/datasets/MLLMMU/MLLMU-Bench"),
    "clear": ("CLEAR (Dontsov et al. 2024)", None, "https://huggingface.co/datasets/therem/CLEAR"),
    "tofu": ("TOFU (Maini et al. 2024)", "MIT", "https://huggingface.co/datasets/locuslab/TOFU"),
    "sb_bench": ("SB-Bench", "CC BY-NC-SA 4.0, research only", "https://huggingface.co/datasets/ucf-crcv/SB-Bench"),
}
"""Tasks on sets that are no source of a build: title, licence (None: its card names none), address."""


def sources_of(path: str, testbed: str | None = None) -> list[dict[str, Any]]:
    """What is known of a set's rows: title, licence and address of every source, [] where nothing is.

    Args:
        path: the set: a folder, a file or a Hub id.
        testbed: the name of the testbed it came with.
    """
    if testbed:
        return STEREOSET_WORLD if testbed == "stereoset" else [MADE_UP]
    folder = Path(path)
    if (folder / "build.json").is_file():
        report = json.loads((folder / "build.json").read_text(encoding="utf-8"))
        return [{key: source.get(key) for key in ("title", "licence", "url")} for source in report.get("sources", [])]
    card = folder / "README.md"
    if card.is_file():
        header = _header(card.read_text(encoding="utf-8"))
        return [{"title": header.get("pretty_name") or folder.name, "licence": header.get("license")}]
    return []


def benchmark_of(task: str) -> tuple[str, str | None, str] | None:
    """Title, licence and address of what a task measures on; None where the rows are the user's own."""
    name = task.partition("@")[0]
    for known, source in SOURCES.items():
        if source.url and (name == known or name.startswith(f"{known}_")):
            return source.title, source.licence, source.url
    return next((BENCHMARKS[known] for known in BENCHMARKS if name == known or name.startswith(f"{known}_")), None)


def _header(card: str) -> dict[str, Any]:
    """The metadata at the head of a dataset card."""
    if not card.startswith("---"):
        return {}
    try:
        header = yaml.safe_load(card.split("---", 2)[1])
    except yaml.YAMLError:
        return {}
    return header if isinstance(header, dict) else {}
