"""Completions scored in one forward pass in which what rows share, words and pictures, is computed once.

`forward_shared` is `forward_completions` for a model that only answers: same log-probabilities, without a gradient's
needs. Whether a model can be run so is not written down by family: `cannot_share` names what is known to exclude it,
and `compare_with_plain` tries it on rows of the user's own.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from biasunlearn_trainer.collators import split_rows
from biasunlearn_trainer.completions import NON_MODEL_KEYS, forward_completions, kept_logits, unwrap
from biasunlearn_trainer.losses.log_probs import upcast
from biasunlearn_trainer.prefix_packing import PackedBatch, pack

# Attention that takes any mask; flash attention takes none.
TAKE_A_MASK = ("sdpa", "eager")
# Mean difference of a token's log-probability, in nats: float32 rounds to about 1e-6, 16 bits to 1e-2.
LARGEST_DIFFERENCE = {torch.float32: 1e-4, torch.float64: 1e-4}
LARGEST_DIFFERENCE_16_BIT = 0.05


@dataclass
class SharedOutput:
    """N completion tokens of B sequences, sequence by sequence, predicted at P <= N positions.

    Attributes:
        logits: (P, V).
        places: (N,) which of the P predicts a token.
        targets: (N,) ids of the tokens.
        counts: how many tokens each sequence has.
        num_tokens: tokens that went through the language model, padding included.
    """

    logits: Tensor
    places: Tensor
    targets: Tensor
    counts: list[int]
    num_tokens: int

    @property
    def token_logps(self) -> Tensor:
        """(N,) log pi(y_t | x, y_<t) in nats, at least float32."""
        logits = upcast(self.logits)
        return logits[self.places, self.targets] - logits.logsumexp(-1)[self.places]


def forward_plain(model: nn.Module, batch: dict[str, Any]) -> SharedOutput:
    """Every row by itself, in the form of `forward_shared`."""
    output = forward_completions(model, batch)
    places = torch.arange(len(output.targets), device=output.targets.device)
    return SharedOutput(output.logits, places, output.targets, output.mask.sum(1).tolist(), batch["input_ids"].numel())


def forward_shared(
    model: nn.Module, batch: Mapping[str, Any], image_token_id: int | None, one_row: bool = False
) -> SharedOutput:
    """Run the model once over all rows, what they share laid out once.

    Args:
        model: for which `cannot_share` is None.
        batch: what `CompletionCollator` returns, on the CPU, and `num_images` (B,).
        image_token_id: which token stands for pictures, if any does.
        one_row: lay all into one row, however wide, so that every rule of the layout is used.
    """
    inner = unwrap(model)
    parts = split_rows(batch) if int(batch["num_images"].sum()) else None
    pictured = {name for name in parts or () if batch[name].shape != batch["input_ids"].shape} - NON_MODEL_KEYS
    packed = pack(
        batch,
        _position_ids(inner, batch),
        batch["input_ids"] == (-1 if image_token_id is None or parts is None else image_token_id),
        _picture_numbers(parts, pictured) if parts else [0] * len(batch["input_ids"]),
        inner.config.get_text_config().hidden_size,
        one_row,
    )
    inputs = {name: value for name, value in packed.inputs.items() if name not in NON_MODEL_KEYS}
    inputs |= {name: torch.cat([parts[name][i] for i in packed.laid_pictures]) for name in pictured}
    inputs["attention_mask"] = _mask_of(inner, packed)
    inputs = {name: value.to(inner.device) for name, value in inputs.items()}
    logits = kept_logits(model, inputs, packed.keep.to(inner.device))
    completion_mask = batch["completion_mask"].bool()
    targets = batch["input_ids"][:, 1:][completion_mask[:, 1:]]
    return SharedOutput(
        logits,
        packed.places.to(logits.device),
        targets.to(logits.device),
        completion_mask[:, 1:].sum(1).tolist(),
        packed.keep.numel(),
    )


def cannot_share(model: nn.Module) -> str | None:
    """Why a model cannot be run so, as far as class and configuration tell; None where nothing speaks against it."""
    inner = unwrap(model)
    config = inner.config.get_text_config()
    if config.is_encoder_decoder or inner.config.is_encoder_decoder:
        return "it has an encoder and a decoder"
    attention = config._attn_implementation
    if attention not in TAKE_A_MASK:
        return f"its attention ({attention}) takes no mask of one's own; {' and '.join(TAKE_A_MASK)} do"
    parameters = inspect.signature(type(inner).forward).parameters
    if "position_ids" not in parameters and not hasattr(inner, "language_model"):
        return "it takes no position_ids"
    return None


def longest_shared(model: nn.Module) -> float:
    """How many tokens a row may have: where attention sees a window alone, the mask must not show it more."""
    config = unwrap(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if window), default=math.inf)


def compare_with_plain(model: nn.Module, batch: dict[str, Any], image_token_id: int | None) -> str | None:
    """Score a batch in both ways.

    Returns:
        None where they agree, else why they do not. A model that gives NaN agrees with itself in nothing.
    """
    plain = forward_plain(model, {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    try:
        shared = forward_shared(model, batch, image_token_id, one_row=True)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as err:
        return f"it raises {type(err).__name__}: {err}"
    difference = float((plain.token_logps - shared.token_logps).abs().mean())
    largest = LARGEST_DIFFERENCE.get(plain.logits.dtype, LARGEST_DIFFERENCE_16_BIT)
    if torch.get_float32_matmul_precision() != "highest":
        largest = LARGEST_DIFFERENCE_16_BIT
    return None if difference <= largest else f"log-probabilities differ by {difference:.2g} nats a token"


def _position_ids(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The positions that the rows' tokens have by themselves: (B, T), or (3, B, T) beside pictures in Qwen2-VL."""
    ids = batch["input_ids"]
    rope_index = getattr(getattr(model, "model", None), "get_rope_index", None)
    if rope_index is None or "mm_token_type_ids" not in batch:
        return torch.arange(ids.shape[1]).expand_as(ids)
    known = inspect.signature(rope_index).parameters
    return rope_index(**{name: value for name, value in batch.items() if name in known})[0]


def _picture_numbers(parts: Mapping[str, tuple[Tensor, ...]], pictured: set[str]) -> list[int]:
    """Of each row the number of its pictures, equal where they are the same to the last bit."""
    numbers: dict[bytes, int] = {}
    found = []
    for tensors in zip(*(parts[name] for name in sorted(pictured)), strict=True):
        digest = hashlib.blake2b(digest_size=16)
        for tensor in tensors:
            digest.update(f"{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        found.append(numbers.setdefault(digest.digest(), len(numbers)))
    return found


def _mask_of(model: nn.Module, packed: PackedBatch) -> Tensor:
    """(R, 1, W, W), what is added to attention's scores; from a boolean mask every layer would make one anew."""
    visible = packed.visible[:, None]
    return torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
