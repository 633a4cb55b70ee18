"""The sources that a build recipe may name: what each is called, its licence, and how its rows are read.

A reader takes a path and options of its own, which a recipe sets beside the path, and yields rows in the schema's
columns. Where a row's `completion` is not the biased answer, `rejected` is that answer, and `kind` says whether the
question can be answered at all: what the task `planted` reads.
"""

import importlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from biasunlearn_trainer.data_builders.images import picture_file, resolve_path, undecoded
from biasunlearn_trainer.data_builders.schema import Faults, check_columns, row_faults
from biasunlearn_trainer.data_builders.sources import (
    bbq,
    crows_pairs,
    image_folder,
    nq_open,
    okvqa,
    pairs,
    passages,
    pata,
    plain,
    stereoset,
    vlstereoset,
)
from biasunlearn_trainer.data_builders.sources.records import READERS, data_suffix, opened

SHARED = re.compile(r"(cc0|cc by|mit|apache|bsd|odc by|odbl|pddl|public domain|ofl|unlicense)\b")
"""How the names of licences begin under which an adapted set may be passed on; what does not fit is refused."""
NOT_SHARED = re.compile(r"\bnd\b|noderiv|no redistribution|research only|not redistributable")


@dataclass(frozen=True)
class Source:
    """A source of rows.

    Attributes:
        title: for the card.
        licence: of what is read; None where the recipe has to say it.
        url: where it is published; "" for a user's own rows.
        read: `read(path, **options)`.
        group: the column whose values stay whole when rows are dealt to parts.
        note: what the publishers ask of its users, for the card.
    """

    title: str
    licence: str | None
    url: str
    read: Callable[..., Iterable[dict]]
    group: str = "pair_id"
    note: str = ""


def sharing_fault(licence: str | None) -> str | None:
    """Says why rows under a licence cannot be passed on, or None where they can.

    >>> sharing_fault("CC BY-SA 4.0") is None
    True
    >>> sharing_fault("CC BY-NC-ND 4.0")
    "its licence 'CC BY-NC-ND 4.0' forbids to pass on adapted copies"
    """
    if not licence:
        return "its licence is not stated; set `licence` beside its path"
    words = re.sub(r"[\s_-]+", " ", licence.strip().casefold())
    if NOT_SHARED.search(words):
        return f"its licence {licence!r} forbids to pass on adapted copies"
    if not SHARED.match(words):
        return f"its licence {licence!r} is not known to allow redistribution"
    return None


def stereoset_rows(path: str, *, task: Literal["both", "intrasentence", "intersentence"] = "both") -> list[dict]:
    """Three rows an item: stereotype, anti-stereotype, unrelated; `target`, `task` and `context` as published."""
    items = [item for item in stereoset.read_stereoset(path) if task in ("both", item.task)]
    extra = {f"stereoset-{item.id}": item for item in items}
    rows = []
    for row in stereoset.to_rows(items):
        item = extra[row["pair_id"]]
        rejected = item.stereotype if item.task == "intrasentence" else " " + item.stereotype
        is_pair = row["polarity"] != "unrelated"
        more = {
            "rejected": rejected if row["polarity"] == "anti_stereotype" else None,
            "kind": "ambiguous" if is_pair else None,
            "target": item.target.casefold().strip(),
            "task": item.task,
            "context": item.context,
        }
        rows.append({**row, **more})
    return rows


def crows_pairs_rows(path: str) -> list[dict]:
    """Two rows a pair: the more stereotypical sentence, then the other."""
    read = crows_pairs.read_crows_pairs(path)
    more = {f"crows_pairs-{pair.id}": pair for pair in read}
    return [
        {
            **row,
            "rejected": None if row["polarity"] == "stereotype" else more[row["pair_id"]].sent_more,
            "kind": "ambiguous",
            "direction": more[row["pair_id"]].direction,
        }
        for row in crows_pairs.to_rows(read)
    ]


def bbq_rows(path: str) -> list[dict]:
    """Of an ambiguous item the biased answer (stereotype) and "cannot be known" (neutral); of others the right one.

    An ambiguous item whose stereotyped group cannot be told has the neutral row alone. So a model can be trained not to
    guess, and still to answer when it is told.
    """
    rows = []
    for item in bbq.read_bbq(path):
        biased = None if item.condition != "ambig" or item.biased is None else f" {item.answers[item.biased]}"
        row = {
            "prompt": f"{item.context}\n\nQ: {item.question}\nA:",
            "bias_type": item.bias_type,
            "pair_id": f"bbq-{item.id}",
            "source": "bbq",
            "source_id": item.id,
            "kind": "ambiguous" if item.condition == "ambig" else "disambiguated",
            "template": item.template,
            "category": item.category,
        }
        if biased is not None:
            rows.append({**row, "completion": biased, "polarity": "stereotype", "rejected": None})
        right = f" {item.answers[item.label]}"
        rows.append({**row, "completion": right, "polarity": "neutral", "rejected": biased})
    return rows


def pairs_rows(path: str, *, sections: list[str] = list(pairs.SECTIONS)) -> list[dict]:  # noqa: B006, never changed
    """Three rows a picture: the stereotyped guess, the other one, and that it cannot be known.

    `scene` says in words what is seen, for stages that draw it anew.
    """
    images = pairs.read_pairs(Path(path).resolve(), sections)
    scenes = [image.scene for image in images]
    biased = pairs.to_rows(images, "stereotype")
    rows = [{**row, "rejected": None, "kind": "ambiguous"} for row in biased]
    for polarity in ("anti_stereotype", "neutral"):
        others = zip(pairs.to_rows(images, polarity), biased, strict=True)
        rows += [{**row, "rejected": other["completion"], "kind": "ambiguous"} for row, other in others]
    return [{**row, "scene": scene} for row, scene in zip(rows, itertools.cycle(scenes), strict=False)]


def passage_rows(path: str, *, num_words: int = 40, seed: int = 0, source: str | None = None) -> list[dict]:
    """Passages of a text file, one paragraph a line, as unrelated rows."""
    rows = passages.read_passages(path, num_words, seed, source)
    return [{**row, "polarity": "unrelated"} for row in rows]


def own_rows(path: str, *, split: str = "train") -> Iterator[dict]:
    """A user's own rows: JSON Lines and CSV are streamed, anything else is loaded as `sources.plain` does."""
    file = Path(path).expanduser()
    if not (file.is_file() and data_suffix(file) in (".jsonl", ".ndjson", ".csv", ".tsv")):
        for row in undecoded(plain.load_rows(path, split, check_images=False)):
            pictures = [picture_file(image) for image in row.get("images") or []]
            yield {**row, "images": pictures} if pictures else row
        return
    faults, number = Faults(str(file)), 0
    with opened(file, faults) as lines:
        for number, (where, row) in enumerate(READERS[data_suffix(file)](lines, faults), start=1):
            row = {"pair_id": str(number), "source": file.name, "source_id": str(number), **row}
            check_columns(row, faults)
            for fault in row_faults(row):
                faults.add(fault, where)
            faults.raise_if_any()
            yield _with_absolute_images(row, file.parent)
    faults.raise_if_any()
    if not number:
        raise ValueError(f"{file} has no rows.")


def _with_absolute_images(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    images = row.pop("image", None) or row.pop("images", None) or []
    images = images if isinstance(images, list) else [images]
    return {**row, "images": [resolve_path(image, folder) for image in images]} if images else row


SOURCES: dict[str, Source] = {
    "stereoset": Source(
        "StereoSet (Nadeem, Bethke and Reddy 2021)",
        "CC BY-SA 4.0",
        "https://github.com/moinnadeem/StereoSet",
        stereoset_rows,
        group="target",
    ),
    "crows_pairs": Source(
        "CrowS-Pairs (Nangia et al. 2020)",
        "CC BY-SA 4.0",
        "https://github.com/nyu-mll/crows-pairs",
        crows_pairs_rows,
        note="Its authors ask not to train on it: use it to measure.",
    ),
    "bbq": Source(
        "BBQ (Parrish et al. 2022)", "CC BY 4.0", "https://github.com/nyu-mll/BBQ", bbq_rows, group="template"
    ),
    "pairs": Source(
        "PAIRS (Fraser and Kiritchenko 2024)",
        "CC BY 4.0",
        "https://github.com/katiefraser/PAIRS",
        pairs_rows,
        note="The questions and guesses are ours. Not to be used to predict anybody's race or gender.",
    ),
    "vlstereoset": Source(
        "VLStereoSet (Zhou, Lai and Jiang 2022)",
        vlstereoset.LICENCE,
        "https://github.com/K-Square-00/VLStereo",
        vlstereoset.vlstereoset_rows,
        group="target",
    ),
    "pata": Source(
        "PATA (Seth, Hemani and Agarwal 2023)",
        pata.LICENCE,
        "https://github.com/pata-fairness/pata_dataset",
        pata.pata_rows,
        group="scene",
        note="Race, gender and age are the publishers' words for a picture.",
    ),
    "nq_open": Source(
        "NQ-open (Lee et al. 2019; Kwiatkowski et al. 2019)",
        nq_open.LICENCE,
        "https://github.com/google-research-datasets/natural-questions",
        nq_open.nq_open_rows,
    ),
    "okvqa": Source("OK-VQA (Marino et al. 2019)", okvqa.LICENCE, "https://okvqa.allenai.org", okvqa.okvqa_rows),
    "image_folder": Source("A folder of pictures and its table", None, "", image_folder.image_folder_rows),
    "passages": Source("Passages of a text", None, "", passage_rows),
    "rows": Source("Rows of a file, a folder or a Hub set", None, "", own_rows),
}

STAGES = {
    "counterfactual": "biasunlearn_trainer.data_builders.counterfactual:Counterfactuals",
    "caption_prompts": "biasunlearn_trainer.data_builders.prompt_templates:CaptionPrompts",
    "debias_benchmark": "biasunlearn_trainer.data_builders.debias_benchmark:DebiasBenchmark",
    "counterfactual_image": "biasunlearn_trainer.data_builders.counterfactual_image:CounterfactualImages",
    "rephrase_image": "biasunlearn_trainer.data_builders.rephrase_image:RephraseImage",
    "rephrase_text": "biasunlearn_trainer.data_builders.rephrase_text:RephraseText",
}
"""Stages by the name that a recipe uses. What a class takes when it is made, a recipe sets beside the name."""


def stage_class(name: str) -> type:
    """Imports a stage's class; its module is imported only where a recipe asks for it."""
    module, _, attribute = STAGES[name].partition(":")
    return getattr(importlib.import_module(module), attribute)
