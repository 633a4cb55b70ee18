"""The run that trains nothing: measure a model, put an adapter of its base on it, measure again, save."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.run_files import ENVIRONMENT_FILE
from biasunlearn_trainer.runner.folder import write_records
from biasunlearn_trainer.runner.models import load_for_run
from biasunlearn_trainer.sharding import whole_weights
from biasunlearn_trainer.transfer import Adapter, TransferError, check_transfer, find_adapter, put_adapter


def checked_adapter(recipe: Recipe, config: Any) -> tuple[Adapter | None, list[str]]:
    """Finds the recipe's adapter and checks it against the model's configuration.

    Args:
        recipe: with its testbed resolved.
        config: the model's configuration.

    Returns:
        The adapter and what is worth knowing about it; None for a recipe that trains.

    Raises:
        RecipeError: with everything that does not fit.
    """
    source, model = recipe.run.transfer_adapter_from, recipe.model.model_name_or_path
    if source is None:
        return None, []
    try:
        with PartialState().main_process_first():
            adapter = find_adapter(source)
        if adapter.folder.resolve() == Path(recipe.training.output_dir).resolve():
            raise ValueError("it lies in output_dir, where the result would replace it. Choose another output_dir.")
        return adapter, check_transfer(adapter, config, model, recipe.run.trust_remote_code)
    except TransferError as err:
        raise RecipeError(err.faults, f"the transfer of {source} to {model}") from err
    except (OSError, ValueError) as err:
        raise RecipeError([f"transfer_adapter_from: {err}"], recipe.source) from err


def describe_transfer(recipe: Recipe, config: Any, adapter: Adapter, tasks: Sequence[Any]) -> str:
    """Says in a few lines what a transfer does."""
    kind = adapter.config.peft_type.value
    rank = f" r {adapter.config.r}, alpha {adapter.config.lora_alpha}" if kind == "LORA" else ""
    lines = {
        "recipe": recipe.source,
        "method": "weight transfer, no training",
        "model": f"{recipe.model.model_name_or_path} ({', '.join(config.architectures or [])})",
        "adapter": f"{adapter.source} ({kind}{rank}, {len(adapter.shapes)} tensors, trained on {adapter.base})",
        "tasks": ", ".join(f"{task.name} ({len(task.rows)} rows)" for task in tasks),
        "output": recipe.training.output_dir,
    }
    return "\n".join(f"{name:<8}{text}" for name, text in lines.items())


def transfer(recipe: Recipe, evaluation: Any, adapter: Adapter) -> list[str]:
    """Measures the model as it is and with the adapter, and saves adapter and processor.

    Args:
        recipe: with its testbed resolved.
        evaluation: measures a model by name, `before`, `after` or `oracle`.
        adapter: as `checked_adapter` returned it.

    Returns:
        What came up on the way.

    Raises:
        RecipeError: a tensor of the adapter is not in its place, or the model with the adapter cannot be measured.
    """
    source, output_dir = recipe.model.model_name_or_path, recipe.training.output_dir
    is_main = PartialState().is_main_process
    with whole_weights():
        model = load_for_run(recipe, source)
        messages = []
        if is_main:
            fingerprint = model_hash(model)
            write_records(recipe, {}, fingerprint, _record_of(adapter))
            messages = _same_model_note(adapter, source, fingerprint)
        evaluation.begin(model, source)
        try:
            model = put_adapter(model, adapter, source, recipe.model.model_revision)
            if is_main:
                save(model, evaluation.processing_class, output_dir)
            evaluation.measure("after", model, output_dir)
        except ValueError as err:
            raise RecipeError(str(err).splitlines(), f"{source} with {adapter.source}, in {output_dir},") from err
    return messages


def save(model: torch.nn.Module, processing_class: Any, output_dir: str) -> None:
    """Writes the adapter, whose configuration names the model that it is on, and the processor."""
    model.save_pretrained(output_dir, save_embedding_layers=False)
    processing_class.save_pretrained(output_dir)


def _record_of(adapter: Adapter) -> dict[str, Any]:
    return {"source": adapter.source, "trained_on": adapter.base, "fingerprint": adapter.fingerprint()}


def _same_model_note(adapter: Adapter, source: str, fingerprint: str) -> list[str]:
    """Says so where the adapter's run recorded weights that are the model's own; a run of ours records them."""
    path = adapter.folder / ENVIRONMENT_FILE
    trained_on = json.loads(path.read_text(encoding="utf-8")).get("model", {}) if path.is_file() else {}
    if trained_on.get("fingerprint") != fingerprint:
        return []
    return [
        f"{source} has the same weights as {trained_on['source']}, which the adapter was trained on (fingerprint "
        f"{fingerprint}): this evaluates the adapter on its own base and transfers nothing."
    ]
