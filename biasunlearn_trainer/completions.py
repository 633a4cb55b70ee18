"""One forward pass that returns what unlearning needs: the log-probabilities of completion tokens.

The output head is the widest layer of a language model, and an image-text row carries hundreds of positions (the
picture) that no loss ever reads. The head therefore runs on completion positions only.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from biasunlearn_trainer.losses import token_log_probs

# Keys of a collated batch that speak to the trainer and not to the model. All others reach the model untouched, so that
# `pixel_values`, `image_grid_thw`, `mm_token_type_ids` and whatever a new family needs pass without a list of names.
NON_MODEL_KEYS = frozenset({"completion_mask", "index", "num_images"})


@dataclass
class CompletionOutput:
    """Completion tokens of B sequences, N in all, at most K in one.

    Attributes:
        logits: (N, V) logits at the positions that predict a completion token, sequence by sequence.
        targets: (N,) ids of those completion tokens.
        mask: (B, K) bool, where the padded form below holds a token.
        token_logps: (B, K) float32, log pi(y_t | x, y_<t) in nats; 0 off the mask.
    """

    logits: Tensor
    targets: Tensor
    mask: Tensor
    token_logps: Tensor

    @property
    def logps(self) -> Tensor:
        """(B,) log pi(y | x) in nats: the sum over completion tokens."""
        return self.token_logps.sum(-1)

    @property
    def lengths(self) -> Tensor:
        """(B,) number of completion tokens, float32."""
        return self.mask.sum(-1).to(self.token_logps.dtype)

    def logits_at(self, places: slice) -> Tensor:
        """(n, V) logits of some of the N positions."""
        return self.logits[places]

    def split(self, sizes: Sequence[int]) -> list[CompletionOutput]:
        """The same of so many sequences each, for a pass over batches that were put together.

        Log-probabilities are cut after they were taken, so that logits which nothing else reads get one gradient.
        """
        lengths = [part.tolist() for part in self.mask.sum(-1).split(list(sizes))]
        tokens = [sum(part) for part in lengths]
        flat = zip(self.logits.split(tokens), self.targets.split(tokens), strict=True)
        padded = zip(self.mask.split(list(sizes)), self.token_logps.split(list(sizes)), strict=True)
        return [
            CompletionOutput(logits, targets, mask[:, : max(part)], logps[:, : max(part)])
            for (logits, targets), (mask, logps), part in zip(flat, padded, lengths, strict=True)
        ]

    def scatter(self, values: Tensor) -> Tensor:
        """Lay (N,) per-token values out as (B, K), with zeros off the mask."""
        return scatter_tokens(values, self.mask)


def scatter_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Lay flat per-token values out by sequence.

    Args:
        values: (N,) one value per kept token, sequence by sequence.
        mask: (B, K) bool with N true entries.

    Returns:
        (B, K), zeros off the mask; gradients flow back to `values`.
    """
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def forward_completions(model: nn.Module, batch: dict[str, Any], fused: bool = True) -> CompletionOutput:
    """Run the model once and keep the completion positions.

    Args:
        model: a causal or image-text model, wrapped (PEFT, DDP, DeepSpeed) or not.
        batch: what `CompletionCollator` returns: (B, T) `input_ids`, `attention_mask`, `completion_mask`, and any
            further input of the model.
        fused: how log-probabilities are taken, see `token_log_probs`.

    Returns:
        The completion tokens' logits and log-probabilities.
    """
    inputs = {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}
    keep = predicting_positions(batch["completion_mask"].bool())
    targets, mask = completion_tokens(batch)
    logits = kept_logits(model, inputs, keep)
    return CompletionOutput(logits, targets, mask, scatter_tokens(token_log_probs(logits, targets, fused), mask))


def predicting_positions(completion_mask: Tensor) -> Tensor:
    """(B, T) bool: position t predicts token t + 1. This is the one place where labels are shifted."""
    keep = torch.zeros_like(completion_mask)
    keep[:, :-1] = completion_mask[:, 1:]
    return keep


def completion_tokens(batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The (N,) completion tokens' ids, sequence by sequence, and the (B, K) mask of their padded form."""
    completion_mask = batch["completion_mask"].bool()[:, 1:]
    lengths = completion_mask.sum(-1)
    mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
    return batch["input_ids"][:, 1:][completion_mask], mask


def kept_logits(model: nn.Module, inputs: dict[str, Any], keep: Tensor) -> Tensor:
    """Run the model once, and its head on some positions alone.

    Args:
        model: a causal or image-text model, wrapped or not.
        inputs: what the model takes.
        keep: (B, T) bool, N of them true.

    Returns:
        (N, V) logits, sequence by sequence.
    """
    inner = unwrap(model)
    if "pixel_values" not in inputs and _needs_pictures(type(inner)):
        # What the image half has found may be there already (`image_features`).
        found = {"pixel_values": None} if "mm_encoder_outputs" in inputs else _without_pictures(inner)
        inputs = inputs | found
    if _takes_logits_to_keep(type(inner)) or _passes_logits_to_keep_on(inner):
        return model(**inputs, logits_to_keep=keep, use_cache=False).logits
    return model(**inputs, use_cache=False).logits[keep]


def generating_model(model: nn.Module, batch: dict[str, Any]) -> nn.Module:
    """What generates answers to a batch: the model, or the language model in one that does nothing without pictures."""
    inner = unwrap(model)
    return inner.language_model if "pixel_values" not in batch and _needs_pictures(type(inner)) else model


def text_positions(batch: dict[str, Any], image_token_id: int | None) -> Tensor:
    """(B, T) bool: every token but padding and image placeholders."""
    kept = batch["attention_mask"].bool()
    return kept if image_token_id is None else kept & (batch["input_ids"] != image_token_id)


def unwrap(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, DeepSpeed and PEFT wrappers."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@lru_cache(maxsize=32)
def _takes_logits_to_keep(model_class: type) -> bool:
    """Whether the class runs its head on chosen positions; a (B, T) boolean mask is exact and flattens the output."""
    return "logits_to_keep" in inspect.signature(model_class.forward).parameters


def _passes_logits_to_keep_on(model: nn.Module) -> bool:
    """Whether the head is that of a whole language model inside, to which the model hands its other arguments on."""
    inside = getattr(model, "language_model", None)
    has_head = inside is not None and inside.get_output_embeddings() is not None
    return has_head and _takes_logits_to_keep(type(inside))


@lru_cache(maxsize=32)
def _needs_pictures(model_class: type) -> bool:
    """Whether the class cannot be called without `pixel_values`, as BLIP-2 cannot."""
    pictures = inspect.signature(model_class.forward).parameters.get("pixel_values")
    return pictures is not None and pictures.default is inspect.Parameter.empty


def _without_pictures(model: nn.Module) -> dict[str, Any]:
    """What makes such a model take rows of text alone through its language model, itself called as ever.

    Calling the language model inside would do the same on one process, but pass DDP and DeepSpeed by.

    Raises:
        ValueError: where the model cannot be told what its image half has found.
    """
    if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
        raise ValueError(
            f"{type(model).__name__} takes no rows without images. Leave them out of the set, or give each a picture."
        )
    from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

    width = model.get_input_embeddings().embedding_dim
    nothing = torch.zeros(0, width, device=model.device, dtype=model.dtype)
    return {
        "pixel_values": None,
        "mm_encoder_outputs": {"image": BaseModelOutputWithVisionQformerOutputs(pooler_output=nothing)},
    }
