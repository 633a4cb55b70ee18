"""The micro-batch that a plan runs: the longest rows of the sets, or rows of a given length where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from biasunlearn_trainer.lengths import row_lengths

TEXT_TOKENS = 512
"""Length of a row's text where neither data nor `max_length` nor the plan says."""
PICTURE_SIDE = 448
"""Pixels of a picture's side, for models that take any size: in the middle of what their processors keep."""


def stand_in_rows(number: int) -> list[dict[str, Any]]:
    """Rows with all columns that a method may ask for; a batch is not made of them."""
    row = {"prompt": "?", "completion": " .", "guidance": ".", "guidance_prompt": "?", "bias_type": "other"}
    return [{**row, "pair_id": str(i)} for i in range(number)]


def stand_in_batch(config: PreTrainedConfig, sizes: Mapping[str, int], tokens: int | None, completion: int) -> dict:
    """A micro-batch without data, one picture a row for a model that takes pictures.

    Args:
        config: the model's.
        sizes: rows by stream.
        tokens: of a row, pictures included; None for `TEXT_TOKENS` beside the picture.
        completion: how many of them are its completion.

    Returns:
        By stream what `StreamCollator` returns.

    Raises:
        ValueError: where a row is too short for its picture and completion, or nobody knows the model's pictures.
    """
    return {name: _stream(config, rows, tokens, completion) for name, rows in sizes.items()}


def _stream(config: PreTrainedConfig, rows: int, tokens: int | None, completion: int) -> dict[str, Tensor]:
    pictures, per_picture = _pictures(config, rows)
    tokens = tokens if tokens is not None else TEXT_TOKENS + per_picture
    if tokens < per_picture + completion + 1:
        raise ValueError(
            f"Rows of {tokens} tokens have no room for a picture of {per_picture}, a completion of {completion} and a "
            "token of prompt. Raise plan_row_tokens (or max_length), or lower plan_completion_tokens."
        )
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    if per_picture:
        ids[:, :per_picture] = image_token(config)
    ids[:, per_picture:] = 1
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pictures}
    if "image_grid_thw" in pictures:
        batch["mm_token_type_ids"] = (ids == image_token(config)).int()
    batch["completion_mask"] = (torch.arange(tokens) >= tokens - completion).repeat(rows, 1)
    batch["index"] = torch.arange(rows)
    batch["num_images"] = torch.full((rows,), int(per_picture > 0))
    return batch


def image_token(config: PreTrainedConfig) -> int | None:
    """The id that image features are laid over; None for a language model."""
    found = getattr(config, "image_token_id", None)
    return found if found is not None else getattr(config, "image_token_index", None)


def _pictures(config: PreTrainedConfig, rows: int) -> tuple[dict[str, Tensor], int]:
    """What the processor makes of one picture a row, and the tokens of a picture."""
    vision = getattr(config, "vision_config", None)
    if vision is None:
        return {}, 0
    if hasattr(vision, "spatial_merge_size"):  # Qwen2-VL: flattened patches and a grid
        side = PICTURE_SIDE // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        pixels, grid = torch.zeros(rows * side**2, values), torch.tensor([[1, side, side]]).repeat(rows, 1)
        return {"pixel_values": pixels, "image_grid_thw": grid}, (side // vision.spatial_merge_size) ** 2
    if not hasattr(vision, "image_size") or image_token(config) is None:
        raise ValueError(
            f"What a picture becomes in a model of type {config.model_type!r} is not known without its processor. "
            "Plan where the processor and the data can be read."
        )
    pixels = torch.zeros(rows, getattr(vision, "num_channels", 3), vision.image_size, vision.image_size)
    if hasattr(config, "num_query_tokens"):  # BLIP-2, MiniGPT-4
        return {"pixel_values": pixels}, config.num_query_tokens
    has_class_token = getattr(config, "vision_feature_select_strategy", "default") == "full"
    return {"pixel_values": pixels}, (vision.image_size // vision.patch_size) ** 2 + has_class_token


def longest_draws(streams: Mapping[str, Any], leaders: Mapping[str, str], sizes: Mapping[str, int]) -> list[dict]:
    """Draws of the rows with the longest texts: what the largest micro-batch may be made of.

    Args:
        streams: of `PairedStreams`, with their `rows`.
        leaders: for a stream whose row i belongs to row i of another, that other one.
        sizes: rows of a micro-batch by stream.

    Returns:
        One draw with the rows of every stream.
    """
    draw = {}
    for name, stream in streams.items():
        leader = leaders.get(name, name)
        group = [streams[other].rows for other in streams if leaders.get(other, other) == leader]
        lengths = np.maximum.reduce([row_lengths(rows, None) for rows in group])
        pictured = streams[leader].modalities[0]  # rows with pictures come first, and are the longer ones
        longest = pictured[np.argsort(-lengths[pictured], kind="stable")]
        draw[name] = [{**stream.rows[int(i)], "index": int(i)} for i in np.resize(longest, sizes[name])]
    return [draw]
