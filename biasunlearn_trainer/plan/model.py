"""The recipe's model without its weights."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from biasunlearn_trainer.adapters import adapter_config
from biasunlearn_trainer.models import load_config, model_class
from biasunlearn_trainer.plan.quantised import pack_linears
from biasunlearn_trainer.plan.shadow import Shadow
from biasunlearn_trainer.recipe import Recipe


def build_model(shadow: Shadow, recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """The model of a recipe as `load_for_run` would load it; what its weights are is not known.

    Args:
        shadow: where its weights have no memory.
        recipe: the recipe.
        config: the model's configuration.
        dtype: of the weights.
    """
    settings, name = recipe.model, recipe.model.model_name_or_path
    model = empty_model(shadow, config, dtype, recipe)
    model.config._name_or_path = name
    if settings.load_in_4bit or settings.load_in_8bit:
        with shadow:
            pack_linears(model, 4 if settings.load_in_4bit else 8, settings.use_bnb_nested_quant, dtype)
    if adapter := adapter_config(name, settings.model_revision):
        with shadow:
            return get_peft_model(model, adapter)
    return model


def empty_model(shadow: Shadow, config: PreTrainedConfig, dtype: torch.dtype, recipe: Recipe) -> nn.Module:
    """A model of a configuration, in eval mode as `from_pretrained` leaves it."""
    options: dict[str, Any] = {"trust_remote_code": True} if recipe.run.trust_remote_code else {}
    if recipe.model.attn_implementation is not None:
        options["attn_implementation"] = recipe.model.attn_implementation
    with shadow, no_init_weights():
        return model_class(config).from_config(config, dtype=dtype, **options).eval()


def weights_dtype(config: PreTrainedConfig, named: str | None) -> torch.dtype:
    """The precision that weights are loaded in: `named`, or the checkpoint's own for `auto` or none."""
    if named not in (None, "auto"):
        return getattr(torch, named)
    found = getattr(config, "dtype", None) or torch.float32
    return getattr(torch, found) if isinstance(found, str) else found


def reference_config(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of the other model that the recipe names as its reference."""
    return load_config(recipe.training.reference_model_name_or_path, trust_remote_code=recipe.run.trust_remote_code)
