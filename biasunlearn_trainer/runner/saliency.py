"""The mask of a run, written out: where it lets gradients through, and what it has in common with what changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate.utils import tqdm

from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.recipe import Recipe
from biasunlearn_trainer.run_files import ENVIRONMENT_FILE
from biasunlearn_trainer.saliency.changes import changes_of
from biasunlearn_trainer.saliency.distribution import Distribution, Share, in_mask
from biasunlearn_trainer.saliency.places import Places
from biasunlearn_trainer.saliency.ranking import most_changed
from biasunlearn_trainer.saliency.report import FIGURE_FILE, TEXT_FILE, density_sentence, write_saliency


def write_mask_report(
    recipe: Recipe,
    trainer: Any,
    folder: str | Path,
    changed: Sequence[Distribution] = (),
    modules: Sequence[tuple[str, Share]] = (),
) -> Distribution:
    """Writes the statistics of a trainer's mask; see `saliency.report`.

    Args:
        recipe: with its testbed resolved.
        trainer: with its mask made.
        folder: where to.
        changed: the most changed weights of finished runs.
        modules: the modules to train with LoRA.

    Returns:
        The mask's distribution.
    """
    found = in_mask(trainer.saliency_mask, Places(trainer.model, recipe.training.module_groups))
    testbed, model = recipe.run.testbed, recipe.model.model_name_or_path
    write_saliency(folder, found, changed, modules, f"Saliency in {f'planted {testbed}' if testbed else model}")
    return found


def add_to_report(report: Path, found: Distribution) -> None:
    """Puts the mask's density and picture at the end of a run's report.md."""
    section = f"## Saliency\n\n{density_sentence(found)} [Layer by layer]({TEXT_FILE}).\n\n![Saliency]({FIGURE_FILE})\n"
    write_text(report, f"{report.read_text(encoding='utf-8')}\n{section}")


def most_changed_in(run: str, recipe: Recipe, fingerprint: str, num: int) -> Distribution:
    """Where the weights lie that a finished run changed most.

    Args:
        run: its folder.
        recipe: whose model the run has to have begun with.
        fingerprint: of that model's weights.
        num: n, how many weights.

    Raises:
        OSError: where there is no finished run.
        ValueError: where the run began with another model, or diverged.
    """
    _check_beginning(run, recipe, fingerprint)
    model = recipe.model
    trust, groups = recipe.run.trust_remote_code, recipe.training.module_groups
    changes = changes_of(run, model.model_name_or_path, model.model_revision, trust, groups)
    weights = sum(changes.places.sizes.values())
    passes = iter(("finding the smallest", "counting"))

    def shown():
        with tqdm(total=weights, desc=f"Changes in {run}, {next(passes)}", unit=" weights", unit_scale=True) as bar:
            for name, change in changes():
                yield name, change
                bar.update(change.numel())
            bar.total = bar.n  # an adapter changes a part of the weights
            bar.refresh()

    found = most_changed(shown, changes.places, num)
    facts = {
        "run": str(run),
        "asked": num,
        "n": found.num,
        "num_changed": found.num_changed,
        "smallest": found.smallest,
    }
    return Distribution(f"Most changed by {run}", found.shares, facts)


def _check_beginning(run: str, recipe: Recipe, fingerprint: str) -> None:
    """Refuses a run that recorded another model's weights."""
    path = Path(run) / ENVIRONMENT_FILE
    record: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    began = record.get("model", {})
    if began and began.get("fingerprint") != fingerprint:
        raise ValueError(
            f"{run} began with {began.get('source')} (fingerprint {began.get('fingerprint')}), the recipe's model "
            f"{recipe.model.model_name_or_path} has {fingerprint}. Name runs of the same model."
        )
