"""Saliency of whole matrices: which of them hold most of what is to be forgotten, as targets for LoRA.

At the start of LoRA B = 0, so A has no gradient and a mask over it says nothing. What can be asked before training is
which matrices are to get an adapter at all: those with the largest share of salient weights in the base model's mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import yaml
from torch import nn
from transformers.pytorch_utils import Conv1D

from biasunlearn_trainer.models import base_model
from biasunlearn_trainer.saliency.distribution import Share, markdown_table, percent
from biasunlearn_trainer.saliency.masks import SaliencyMask
from biasunlearn_trainer.saliency.places import PEFT_PARTS


def rank_modules(mask: SaliencyMask, model: nn.Module) -> list[tuple[str, Share]]:
    """The linear layers that a mask covers, the one with the largest share of salient weights first.

    Args:
        mask: over the weights of the model itself, not of an adapter.
        model: the one that the mask was made for. Its output head is left out, as is usual for LoRA.

    Returns:
        Names with their shares, biases left out; equal shares in the model's order.

    Raises:
        ValueError: where the mask covers an adapter, or no linear layer.
    """
    if any(PEFT_PARTS.search(name) for name in mask.shapes):
        raise ValueError(
            "The mask covers the weights of an adapter; modules are ranked before there is one. Set use_peft: false."
        )
    model = base_model(model)
    head = model.get_output_embeddings()
    shares = [
        (name, Share(math.prod(mask.shapes[f"{name}.weight"]), mask.count(f"{name}.weight")))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and f"{name}.weight" in mask.shapes
    ]
    if not shares:
        raise ValueError("The mask covers no linear layer. Choose other `trainable_groups`.")
    return sorted(shares, key=lambda entry: -entry[1].share)


def target_modules_line(modules: Sequence[str]) -> str:
    """The recipe's line that puts LoRA on these modules and no others.

    Example:
        >>> target_modules_line(["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"])
        'lora_target_modules: [model.layers.0.mlp.up_proj, model.layers.1.mlp.up_proj]'
    """
    return yaml.safe_dump({"lora_target_modules": [*modules]}, default_flow_style=None, width=10**9).strip()


def modules_table(ranked: Sequence[tuple[str, Share]]) -> str:
    """Markdown: the modules with their shares."""
    rows = [[name, f"{share.covered:,}", f"{share.chosen:,}", percent(share)] for name, share in ranked]
    return markdown_table(["module", "weights", "salient", "share"], rows)
