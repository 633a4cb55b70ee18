"""Trackers (`report_to`): there before the model is loaded, and given the run's table and picture at its end.

What is logged in training (parts of the loss, probes, swaps) reaches them by `Trainer.log` and the callbacks of
transformers; these close when training ends, before the model is measured.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers.integrations import integration_utils

from biasunlearn_trainer.eval.findings import entries_of, metrics_of, tasks_of
from biasunlearn_trainer.eval.report.table import markdown_table
from biasunlearn_trainer.recipe import Recipe, RecipeError

logger = logging.getLogger(__name__)

PACKAGES = {"comet_ml": "comet-ml", "azure_ml": "azureml-core"}
COLUMNS = ["task", "metric", "n", "before", "after", "low", "high", "oracle", "ideal"]
Row = list[Any]


def check_trackers(recipe: Recipe) -> None:
    """Refuses trackers that do not exist or are not installed.

    Raises:
        RecipeError: with each of them and the command that installs it.
    """
    args = recipe.training
    names = [args.report_to] if isinstance(args.report_to, str) else list(args.report_to or [])
    there = integration_utils.get_available_reporting_integrations()
    faults = []
    for name in names:
        if name not in integration_utils.INTEGRATION_TO_CALLBACK and name not in ("none", "all"):
            near = get_close_matches(name, integration_utils.INTEGRATION_TO_CALLBACK, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            faults.append(f"report_to: there is no tracker {name!r}.{hint}")
        elif name in integration_utils.INTEGRATION_TO_CALLBACK and name not in there:
            package = PACKAGES.get(name, name)
            faults.append(f"report_to: {name} is not installed. `pip install {package}`, or `report_to: none`.")
    if faults:
        raise RecipeError(faults, recipe.source)
    if "trackio" in names and args.run_name is None:
        # Trackio's run ends with the training; its name is how the results find it again.
        args.run_name = f"{Path(args.output_dir).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def log_results(recipe: Recipe, results: Mapping[str, Any], figure: Path) -> None:
    """Gives every tracker of the run its table and its picture; one that fails costs a warning, not the run.

    Args:
        recipe: the recipe.
        results: by state, in the layout of `eval.schema`.
        figure: the report's picture.
    """
    args = recipe.training
    for name in args.report_to or []:
        if name not in LOGGERS:
            continue
        try:
            LOGGERS[name](args, results, figure)
        except Exception as err:  # trackers raise whatever they like
            logger.warning("%s did not take the results: %s: %s", name, type(err).__name__, err)


def result_rows(results: Mapping[str, Any]) -> list[Row]:
    """A row a metric, in the order of `COLUMNS`; the interval is that of the value after."""
    rows = []
    for task in tasks_of(results):
        for metric in metrics_of(results, task):
            before, after, oracle = entries_of(results, task, metric)
            shown = after or before or oracle or {}
            values = [entry["value"] if entry else None for entry in (before, after)]
            ends = list(shown.get("ci95") or (None, None))
            oracle_value = oracle["value"] if oracle else None
            rows.append([task, metric, shown.get("n"), *values, *ends, oracle_value, shown.get("ideal")])
    return rows


def _scalars(results: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"results/{state}/{row[0]}/{row[1]}": row[COLUMNS.index(state)]
        for row in result_rows(results)
        for state in ("before", "after", "oracle")
        if row[COLUMNS.index(state)] is not None
    }


def _to_tensorboard(args: Any, results: Mapping[str, Any], figure: Path) -> None:
    import numpy as np
    import PIL.Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=tensorboard_folder(args)) as writer:
        for task in tasks_of(results):
            writer.add_text(f"results/{task}", markdown_table(results, task))
        for name, value in _scalars(results).items():
            writer.add_scalar(name, value)
        if figure.is_file():
            picture = np.asarray(PIL.Image.open(figure).convert("RGB"))
            writer.add_image("results/report", picture, dataformats="HWC")


def tensorboard_folder(args: Any) -> str:
    """Where the training's events lie, so that the results stand in the same run."""
    named = os.environ.get("TENSORBOARD_LOGGING_DIR")
    if named:
        return os.path.expanduser(named)
    runs = sorted(Path(args.output_dir, "runs").glob("*"), key=lambda path: path.stat().st_mtime)
    return str(runs[-1]) if runs else os.path.join(args.output_dir, integration_utils.default_logdir())


def _to_wandb(args: Any, results: Mapping[str, Any], figure: Path) -> None:
    import wandb

    run = wandb.run or wandb.init(project=os.getenv("WANDB_PROJECT", "huggingface"), name=args.run_name)
    run.summary.update(_scalars(results))
    run.log({"results/table": wandb.Table(columns=COLUMNS, data=result_rows(results))})
    if figure.is_file():
        run.log({"results/report": wandb.Image(str(figure))})


def _to_trackio(args: Any, results: Mapping[str, Any], figure: Path) -> None:
    import trackio

    trackio.init(
        project=args.project,
        name=args.run_name,
        space_id=args.trackio_space_id,
        bucket_id=args.trackio_bucket_id,
        private=args.hub_private_repo,
        resume="allow",
    )
    try:
        table = [dict(zip(COLUMNS, row, strict=True)) for row in result_rows(results)]
        logged: dict[str, Any] = {**_scalars(results), "results/table": trackio.Table(data=table)}
        if figure.is_file():
            logged["results/report"] = trackio.Image(str(figure))
        trackio.log(logged)
    finally:
        trackio.finish()


LOGGERS: dict[str, Callable[[Any, Mapping[str, Any], Path], None]] = {
    "tensorboard": _to_tensorboard,
    "wandb": _to_wandb,
    "trackio": _to_trackio,
}
