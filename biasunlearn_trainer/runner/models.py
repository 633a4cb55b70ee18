"""The models of a run: loaded as the recipe says, on the run's device, whole or in shards."""

from __future__ import annotations

import torch
from trl import get_quantization_config

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.recipe import Recipe
from biasunlearn_trainer.sharding import is_sharded


def load_for_run(recipe: Recipe, source: str) -> torch.nn.Module:
    """Loads a model with the recipe's precision and quantisation.

    Args:
        recipe: the recipe.
        source: the model to unlearn, the oracle, or the folder of the result.

    Returns:
        The model, on the run's device unless quantisation or sharding has placed it.
    """
    model = recipe.model
    quantization = get_quantization_config(model)
    loaded = load_model(
        source,
        dtype=model.dtype,
        revision=model.model_revision if source == model.model_name_or_path else None,
        attn_implementation=model.attn_implementation,
        quantization_config=quantization,
        device_map={"": recipe.training.device} if quantization is not None else None,
        trust_remote_code=recipe.run.trust_remote_code,
    )
    return loaded if quantization is not None or is_sharded() else loaded.to(recipe.training.device)
