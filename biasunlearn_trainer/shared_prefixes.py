"""Completions scored in one forward pass in which what rows share, words and pictures, is computed once.

`forward_shared` is `forward_completions` for a model that only answers: same log-probabilities, without a gradient's
needs. Whether a model can be run so is not written down by family: `cannot_share` names what is known to exclude it,
and `compare_with_plain` tries it on rows of the user's own.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from biasunlearn_trainer.collators import split_rows
from biasunlearn_trainer.completions import NON_MODEL_KEYS, forward_completions, kept_logits, unwrap
from biasunlearn_trainer.losses.fused import normaliser
from biasunlearn_trainer.losses.log_probs import upcast
from biasunlearn_trainer.prefix_trees import PrefixTree, prefix_tree

# Attention that takes any mask; flash attention takes none.
TAKE_A_MASK = ("sdpa", "eager")
# What attention is called in the models' configurations while it gets its tokens in blocks.
IN_BLOCKS = "blocks_of_a_tree"
# Blocks in which a model is tried: several, so that one that does not ask for its attention as others do is found out.
COMPARED_BLOCKS = 3
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
        return upcast(self.logits[self.places, self.targets]) - normaliser(self.logits)[self.places]

    @property
    def first_choices(self) -> Tensor:
        """(N,) ids of the words with the largest logits; numpy finds them on a CPU in a ninth of torch's time."""
        logits = self.logits
        if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
            return torch.from_numpy(logits.detach().numpy().argmax(-1))[self.places]
        return logits.argmax(-1)[self.places]


def forward_plain(model: nn.Module, batch: dict[str, Any]) -> SharedOutput:
    """Every row by itself, in the form of `forward_shared`."""
    output = forward_completions(model, batch)
    places = torch.arange(len(output.targets), device=output.targets.device)
    return SharedOutput(output.logits, places, output.targets, output.mask.sum(1).tolist(), batch["input_ids"].numel())


def forward_shared(
    model: nn.Module, batch: Mapping[str, Any], image_token_id: int | None, num_blocks: int | None = None
) -> SharedOutput:
    """Run the model once over all rows, what they share laid out once.

    Args:
        model: for which `cannot_share` is None.
        batch: what `CompletionCollator` returns, on the CPU, and `num_images` (B,).
        image_token_id: which token stands for pictures, if any does.
        num_blocks: of attention; by default what costs the least.
    """
    inner = unwrap(model)
    parts = split_rows(batch) if int(batch["num_images"].sum()) else None
    pictured = {name for name in parts or () if batch[name].shape != batch["input_ids"].shape} - NON_MODEL_KEYS
    tree = prefix_tree(
        batch,
        _position_ids(inner, batch),
        batch["input_ids"] == (-1 if image_token_id is None or parts is None else image_token_id),
        _picture_numbers(parts, pictured) if parts else [0] * len(batch["input_ids"]),
        inner.device.type,
        num_blocks,
    )
    inputs = {name: value for name, value in tree.inputs.items() if name not in NON_MODEL_KEYS}
    inputs |= {name: torch.cat([parts[name][i] for i in tree.laid_pictures]) for name in pictured}
    inputs["attention_mask"] = _mask_of(inner, tree)
    inputs = {name: value.to(inner.device) for name, value in inputs.items()}
    with _attention_in_blocks(inner, tree.keys.to(inner.device)):
        logits = kept_logits(model, inputs, tree.keep.to(inner.device))
    completion_mask = batch["completion_mask"].bool()
    targets = batch["input_ids"][:, 1:][completion_mask[:, 1:]]
    return SharedOutput(
        logits,
        tree.places.to(logits.device),
        targets.to(logits.device),
        completion_mask[:, 1:].sum(1).tolist(),
        tree.keep.numel(),
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
        shared = forward_shared(model, batch, image_token_id, COMPARED_BLOCKS)
    except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as err:
        return f"it raises {type(err).__name__}: {err}"
    difference = float((plain.token_logps - shared.token_logps).abs().mean())
    largest = LARGEST_DIFFERENCE.get(plain.logits.dtype, LARGEST_DIFFERENCE_16_BIT)
    if torch.get_float32_matmul_precision() != "highest":
        largest = LARGEST_DIFFERENCE_16_BIT
    return None if difference <= largest else f"log-probabilities differ by {difference:.2g} nats a token"


@contextmanager
def _attention_in_blocks(model: nn.Module, keys: Tensor) -> Iterator[None]:
    """Attention of the language model gets a tree's tokens in blocks, each with the (R, K) tokens that it asks."""
    configs = {
        id(module.config): module.config for module in model.get_decoder().modules() if hasattr(module, "config")
    }
    usual = {key: config._attn_implementation for key, config in configs.items()}

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **options: Any):
        num_tokens, length = query.shape[2], mask.shape[2]
        padding = len(keys) * length - num_tokens
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(usual[id(module.config)], eager)
        query = nn.functional.pad(query[0].transpose(0, 1), (0, 0, 0, 0, 0, padding)).unflatten(0, (-1, length))
        key, value = (
            states[0].transpose(0, 1).index_select(0, keys.flatten()).unflatten(0, keys.shape).transpose(1, 2)
            for states in (key, value)
        )
        output, weights = attention(module, query.transpose(1, 2), key, value, mask, **options)
        return output.flatten(0, 1)[None, :num_tokens], weights

    ALL_ATTENTION_FUNCTIONS[IN_BLOCKS] = attend
    try:
        for config in configs.values():
            config._attn_implementation = IN_BLOCKS
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = usual[key]
        del ALL_ATTENTION_FUNCTIONS[IN_BLOCKS]


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


def _mask_of(model: nn.Module, tree: PrefixTree) -> Tensor:
    """(R, 1, Q, K), what is added to attention's scores; from a boolean mask every layer would make one anew."""
    visible = tree.visible[:, None]
    return torch.zeros(visible.shape, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)
