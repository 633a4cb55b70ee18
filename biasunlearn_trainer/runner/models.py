"""The models of a run: loaded as the recipe says, on the run's device, whole or in shards."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers.integrations import deepspeed as hf_deepspeed
from trl import get_quantization_config

from biasunlearn_trainer.models import FSDP_VARIABLE, is_sharded, load_model
from biasunlearn_trainer.recipe import Recipe


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


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models loaded inside are whole on every process, even where training shards them.

    `from_pretrained` looks at two globals: DeepSpeed's config (ZeRO-3 partitions while loading) and FSDP's environment
    variable (all ranks but the first load nothing).
    """
    config, fsdp = hf_deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(FSDP_VARIABLE, None)
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ[FSDP_VARIABLE] = fsdp
