"""Sequences that begin alike, laid out so that what they share stands once.

The sequences of a batch make a tree: candidates of a question part after the question, questions about a picture after
the picture. Its tokens stand in depth-first order in one row, with the positions that they would have by themselves, so
that whatever a model does for a token by itself it does once for each, without padding. Attention alone looks at other
tokens. It gets the row in blocks: the tokens of a block ask, and what they ask are the ancestors of the block's first
token and the block itself, since in this order no other token comes before one of the block in its sequence. It is one
forward pass without a cache, exact wherever a model takes positions and attention as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Lengths of a block that are tried.
BLOCKS = (16, 32, 64, 128, 256, 512, 1024)
# What it costs to lay a token into a block, beside looking from one token at another: measured on one thread, where all
# from 8 to 32 do as well; for a GPU from bytes a second over operations a second.
LAYING = {"cpu": 16}
ELSEWHERE = 200


class PrefixTree(NamedTuple):
    """B sequences as a tree of M tokens, of which P predict one of N completion tokens; R blocks for attention.

    Attributes:
        inputs: (1, M) `input_ids` and whatever else the batch had for each token, and (1, M) or (3, 1, M)
            `position_ids`. What belongs to pictures is not in here.
        keys: (R, K) numbers of the tokens that a block of Q = ceil(M / R) tokens may ask; 0 where there are fewer.
        visible: (R, Q, K) bool, which of them a token of the block sees.
        keep: (1, M) bool, P of them true.
        places: (N,) which of the P predicts each completion token, sequence by sequence.
        laid_pictures: numbers of the sequences whose pictures stand in the tree, in the order in which they stand.
    """

    inputs: dict[str, Tensor]
    keys: Tensor
    visible: Tensor
    keep: Tensor
    places: Tensor
    laid_pictures: list[int]


def prefix_tree(
    batch: Mapping[str, Tensor],
    position_ids: Tensor,
    is_picture: Tensor,
    pictures: Sequence[int],
    device_type: str = "cpu",
    num_blocks: int | None = None,
) -> PrefixTree:
    """Lay out the sequences of a batch. The last token of a sequence predicts nothing and is left out.

    Args:
        batch: (B, T) `input_ids` and `completion_mask`, right-padded, and further tensors of this shape.
        position_ids: (B, T), or (3, B, T) where a model has several for each token.
        is_picture: (B, T) bool, which tokens stand for pictures.
        pictures: of each sequence the number of its picture, or of its list of them: equal where the pictures are.
        device_type: where the model runs, by which the length of a block is chosen.
        num_blocks: give attention so many blocks at most, and no fewer where their tokens can be dealt so.
    """
    ids, completion_mask = batch["input_ids"].cpu().numpy(), batch["completion_mask"].cpu().numpy().astype(bool)
    is_picture = is_picture.cpu().numpy()
    tokens = np.where(is_picture, -1 - np.asarray(pictures)[:, None], ids)
    lengths = ids.shape[1] - 1 - completion_mask[:, ::-1].argmax(1)
    order = sorted(range(len(ids)), key=lambda i: tokens[i, : lengths[i]].tolist())
    shared = _shared_lengths(tokens[order], lengths[order], is_picture[order])
    where, end = _depth_first(order, shared, lengths, ids.shape)
    lengths_tried = BLOCKS if num_blocks is None else (-(-len(end) // num_blocks),)
    keys, visible = _blocks(where, end, lengths_tried, LAYING.get(device_type, ELSEWHERE))
    predictors = torch.from_numpy(where[:, :-1][completion_mask[:, 1:]])
    keep = torch.zeros(len(end), dtype=torch.bool)
    keep[predictors] = True
    per_token = {name: value for name, value in batch.items() if value.shape == ids.shape}
    return PrefixTree(
        {name: _laid(value, where, len(end)) for name, value in {**per_token, "position_ids": position_ids}.items()},
        torch.from_numpy(keys),
        torch.from_numpy(visible),
        keep[None],
        (keep.cumsum(0) - 1)[predictors],
        [i for i, common in zip(order, shared, strict=True) if is_picture[i, common : lengths[i]].any()],
    )


def _shared_lengths(tokens: np.ndarray, lengths: np.ndarray, is_picture: np.ndarray) -> np.ndarray:
    """How many first tokens each sorted sequence has in common with the one before it; pictures as a whole or not."""
    same = np.cumprod(tokens[1:] == tokens[:-1], axis=1).sum(1)
    shared = np.concatenate([[0], np.minimum(same, np.minimum(lengths[1:], lengths[:-1]))])
    behind_pictures = np.where(is_picture.any(1), is_picture.shape[1] - is_picture[:, ::-1].argmax(1), 0)
    return np.where(shared < behind_pictures, 0, shared)


def _depth_first(
    order: Sequence[int], shared: np.ndarray, lengths: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the sequences' tokens in the tree.

    Returns:
        (B, T) the number of each token, -1 for what is not laid out, and (M,) where a token's descendants end: token k
        is t or stands before it in a sequence just if k <= t < end[k].
    """
    where = np.full(shape, -1)
    end = np.empty(int((lengths[order] - shared).sum()), dtype=np.int64)
    before, total = order[0], 0
    for i, common in zip(order, shared.tolist(), strict=True):
        own = int(lengths[i]) - common
        where[i, :common] = where[before, :common]
        where[i, common : common + own] = np.arange(total, total + own)
        before, total = i, total + own
        end[where[i, : common + own]] = total
    return where, end


def _blocks(where: np.ndarray, end: np.ndarray, lengths: Sequence[int], laying: int) -> tuple[np.ndarray, np.ndarray]:
    """(R, K) keys and (R, Q, K) visible for the cheapest of some lengths of a block."""
    num_tokens = len(end)
    rows, depths = np.empty((2, num_tokens), dtype=np.int64)
    laid = where >= 0
    rows[where[laid]], depths[where[laid]] = np.nonzero(laid)

    def shape(length: int) -> tuple[int, int, int]:
        """R, Q and K where no block is longer than this, and all are alike."""
        num_blocks = -(-num_tokens // length)
        length = -(-num_tokens // num_blocks)
        return num_blocks, length, int(depths[::length].max()) + length

    def cost(shape: tuple[int, int, int]) -> int:
        num_blocks, length, num_keys = shape
        return num_blocks * (length * (laying + num_keys) + laying * num_keys)

    num_blocks, length, num_keys = min(map(shape, lengths), key=cost)
    tokens = np.arange(num_blocks * length).reshape(num_blocks, length, 1)
    keys = np.full((num_blocks, 1, num_keys), num_tokens)
    for asked, first in zip(keys[:, 0], tokens[:, 0, 0].tolist(), strict=True):
        depth = depths[first]
        asked[:depth] = where[rows[first], :depth]
        asked[depth : depth + length] = np.arange(first, first + length)
    keys = np.minimum(keys, num_tokens)
    visible = (keys <= tokens) & (tokens < np.append(end, 0)[keys])
    return np.where(keys < num_tokens, keys, 0)[:, 0], visible


def _laid(values: Tensor, where: np.ndarray, num_tokens: int) -> Tensor:
    """(..., B, T) values of tokens as (..., 1, M)."""
    values, there = values.cpu(), where >= 0
    row = values.new_empty(*values.shape[:-2], 1, num_tokens)
    row[..., 0, torch.from_numpy(where[there])] = values[..., torch.from_numpy(there)]
    return row
