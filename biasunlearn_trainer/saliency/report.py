"""What is written about a mask: `saliency.md`, `saliency.json` and `saliency.png`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.saliency.distribution import (
    Distribution,
    Share,
    groups_table,
    layers_table,
    percent,
    single_table,
)
from biasunlearn_trainer.saliency.heatmap import draw_heatmap
from biasunlearn_trainer.saliency.modules import modules_table, target_modules_line

TEXT_FILE, DATA_FILE, FIGURE_FILE = "saliency.md", "saliency.json", "saliency.png"
MEANING = (
    "A weight is salient where its Fisher value on what is to be forgotten is at least `threshold` times the one on "
    "what is to be preserved."
)


def write_saliency(
    folder: str | os.PathLike,
    mask: Distribution,
    changed: Sequence[Distribution] = (),
    modules: Sequence[tuple[str, Share]] = (),
    title: str = "Saliency",
) -> Path:
    """Writes the three files of a mask.

    Args:
        folder: made where it is missing.
        mask: the mask's distribution.
        changed: those of the most changed weights of runs.
        modules: the modules to train with LoRA, best first, where they were asked for.
        title: the heading.

    Returns:
        The path of `saliency.md`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_heatmap(folder / FIGURE_FILE, [mask, *changed], title)
    data: dict[str, Any] = {"salient": mask.to_dict(), "most_changed": [one.to_dict() for one in changed]}
    if modules:
        data["modules"] = [{"name": name, **share.to_dict()} for name, share in modules]
    write_text(folder / DATA_FILE, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / TEXT_FILE, saliency_markdown(mask, changed, modules, title))
    return folder / TEXT_FILE


def saliency_markdown(
    mask: Distribution,
    changed: Sequence[Distribution] = (),
    modules: Sequence[tuple[str, Share]] = (),
    title: str = "Saliency",
) -> str:
    """The text of saliency.md: how dense the mask is, the picture, the groups, then layer by layer."""
    parts = [f"# {' '.join(title.split())}", density_sentence(mask), *_how_made(mask.facts.get("mask", {}))]
    parts += [f"![Saliency]({FIGURE_FILE})", "## Groups and their unions", groups_table([mask, *changed])]
    parts += [f"{one.title}: {_how_chosen(one)}" for one in changed]
    if modules:
        parts += ["## Modules with the largest share", modules_table(modules)]
        parts += ["In a recipe with `use_peft: true`:", f"```yaml\n{target_modules_line([n for n, _ in modules])}\n```"]
    for one in [mask, *changed]:
        for group in one.groups:
            parts += [f"## {one.title}: {group}", layers_table(one, group), single_table(one, group)]
    parts.append(f"All counts: [{DATA_FILE}]({DATA_FILE}).")
    return "\n\n".join(part for part in parts if part) + "\n"


def density_sentence(mask: Distribution) -> str:
    """How many of the covered weights the mask lets through."""
    total = mask.total
    return f"The mask lets {total.chosen:,.0f} of {total.covered:,} covered weights through ({percent(total)})."


def _how_made(made: Mapping[str, Any]) -> list[str]:
    """How the mask came about; nothing of a mask that does not say."""
    if "settings" not in made:
        return []
    settings, target, preserve = made["settings"], made["target"], made["preserve"]
    sentences = [
        MEANING,
        f"Threshold {settings['threshold']:g}, Fisher {settings['fisher']}, {target['rows']:,} rows to forget, "
        f"{preserve['rows']:,} to preserve.",
    ]
    if made["kind"] == "random":
        sentences.append(f"This one is the control: as many of each weight, drawn at random (seed {made['seed']}).")
    return [" ".join(sentences)]


def _how_chosen(found: Distribution) -> str:
    """What the n most changed weights are, of a distribution of such."""
    facts = found.facts
    short = "" if facts["n"] == facts["asked"] else f" ({facts['asked']:,} were asked for; no more changed)"
    return (
        f"the {facts['n']:,} weights that changed most{short}, by {facts['smallest']:.3g} or more, of "
        f"{facts['num_changed']:,} that changed at all."
    )
