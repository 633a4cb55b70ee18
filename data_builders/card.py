"""The dataset card of a built set: what is in it, from where, under which licences, and what was left out.

A count stands beside every name, so that a bias type with 20 rows is seen as such.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from biasunlearn_trainer.version import __version__

HUB_LICENCES = {
    "cc by 4.0": "cc-by-4.0",
    "cc by-sa 4.0": "cc-by-sa-4.0",
    "cc by-nc 4.0": "cc-by-nc-4.0",
    "cc by-nc-sa 4.0": "cc-by-nc-sa-4.0",
    "cc by-sa 3.0": "cc-by-sa-3.0",
    "cc0 1.0": "cc0-1.0",
    "mit": "mit",
    "apache-2.0": "apache-2.0",
}


@dataclass
class SplitReport:
    """What was written for one split: rows, fingerprint, and rows by bias type and polarity."""

    num_rows: int
    fingerprint: str
    bias_types: Mapping[str, int]
    polarities: Mapping[str, int]


@dataclass
class BuildReport:
    """What a build found and did; the card is written from it, and `build.json` holds it with the recipe.

    Attributes:
        name: of the set.
        description: as the recipe has it.
        seed: of everything drawn.
        sources: of each source its title, licence, url, note, and `num_rows` read.
        stages: of each stage its name, settings, how many rows came in and went out, and how often it asked for them.
        splits: by name.
        rejects: how many rows were left out, by stage and reason.
        duplicates: how many rows a split has twice, by its name.
        leaks: how many rows two splits share, by their names.
        near_duplicates: how many rows of one split are nearly rows of the other.
        notes: sentences for the card, what a reader should know.
    """

    name: str
    description: str
    seed: int
    sources: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    splits: dict[str, SplitReport] = field(default_factory=dict)
    rejects: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: dict[str, int] = field(default_factory=dict)
    leaks: dict[str, int] = field(default_factory=dict)
    near_duplicates: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def write_card(report: BuildReport, files: Mapping[str, str]) -> str:
    """The text of README.md.

    Args:
        report: of the build.
        files: the Parquet file of each split, relative to the card.
    """
    licences = sorted({source["licence"] or "unknown" for source in report.sources})
    header = {
        "pretty_name": report.name,
        "license": HUB_LICENCES.get(licences[0].lower(), "other") if len(licences) == 1 else "other",
        "tags": ["unlearning", "social-bias", "biasunlearn_trainer"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": path} for split, path in files.items()],
            }
        ],
    }
    parts = [
        "---\n" + yaml.safe_dump(header, sort_keys=False, allow_unicode=True) + "---",
        f"# {report.name}",
        report.description,
        _table("Splits", ("split", "rows", "fingerprint"), _split_rows(report)),
        _table("Rows by bias type", ("bias type", *report.splits), _counts(report, "bias_types")),
        _table("Rows by polarity", ("polarity", *report.splits), _counts(report, "polarities")),
        _table("Sources", ("source", "licence", "rows read", "published at"), _source_rows(report)),
        _notes(report),
        _table("Stages", ("stage", "settings", "rows in", "attempts", "rows out"), _stage_rows(report)),
        _table("Left out", ("stage", "reason", "rows"), _reject_rows(report)) or "## Left out\n\nNothing.",
        _checks(report),
        f"Built by biasunlearn_trainer {__version__} with seed {report.seed}; see `build.json`.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    text = "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)
    return f"## {title}\n\n{text}"


def _split_rows(report: BuildReport) -> list[tuple]:
    return [(name, split.num_rows, f"`{split.fingerprint}`") for name, split in report.splits.items()]


def _counts(report: BuildReport, what: str) -> list[tuple]:
    counts = {name: getattr(split, what) for name, split in report.splits.items()}
    values = sorted({value for split in counts.values() for value in split})
    return [(value, *(counts[name].get(value, 0) for name in counts)) for value in values]


def _source_rows(report: BuildReport) -> list[tuple]:
    return [
        (source["title"], source["licence"] or "unknown", source["num_rows"], source["url"])
        for source in report.sources
    ]


def _notes(report: BuildReport) -> str:
    notes = [f"{source['title']}: {source['note']}" for source in report.sources if source.get("note")]
    return "\n".join(f"- {note}" for note in dict.fromkeys([*notes, *report.notes]))


def _stage_rows(report: BuildReport) -> list[tuple]:
    settings = [
        ", ".join(f"{key}={value!r:.80}" for key, value in stage["settings"].items()) for stage in report.stages
    ]
    return [
        (stage["name"], text, stage["rows_in"], stage.get("attempts") or "", stage["rows_out"])
        for stage, text in zip(report.stages, settings, strict=True)
    ]


def _reject_rows(report: BuildReport) -> list[tuple]:
    return [(stage, reason, count) for stage, reasons in report.rejects.items() for reason, count in reasons.items()]


def _checks(report: BuildReport) -> str:
    lines = [f"- {count} row(s) of {name} repeat another one of it." for name, count in report.duplicates.items()]
    lines += [f"- {count} row(s) of {pair} are the same." for pair, count in report.leaks.items()]
    lines += [f"- {count} row(s) of {pair} are nearly the same." for pair, count in report.near_duplicates.items()]
    return "## Checks between splits\n\n" + ("\n".join(lines) or "One split: nothing to compare.")
