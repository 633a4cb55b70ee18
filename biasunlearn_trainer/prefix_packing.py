"""Sequences that begin alike, laid into few rows in which what they share stands once.

The sequences of a batch make a tree: candidates of a question part after the question, questions about a picture after
the picture. Laid out in depth-first order in one row, with a mask by which every token sees its own ancestors alone
and with the positions that it would have by itself, each branch is computed as if it stood alone, and a shared token is
computed once. Several trees share a row where there is room, so that little of it is padding. It is one forward pass
without a cache, exact wherever a model takes positions and a mask as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# Widths of a row that are tried beside the longest sequence and twice that.
WIDTHS = (128, 256, 512)


class PackedBatch(NamedTuple):
    """B sequences in R rows of W tokens, of which P predict one of N completion tokens.

    Attributes:
        inputs: (R, W) `input_ids` and whatever else the batch had for each token, and (R, W) or (3, R, W)
            `position_ids`. What belongs to pictures is not in here.
        visible: (R, W, W) bool, which tokens (last axis) a token sees.
        keep: (R, W) bool, P of them true.
        places: (N,) which of the P predicts each completion token, sequence by sequence.
        laid_pictures: numbers of the sequences whose pictures stand in the rows, in the order in which they stand.
    """

    inputs: dict[str, Tensor]
    visible: Tensor
    keep: Tensor
    places: Tensor
    laid_pictures: list[int]


class _Laid(NamedTuple):
    """Where a sequence stands: its own tokens begin at `start` of row `row`, behind `shared` of the one before it."""

    sequence: int
    row: int
    start: int
    shared: int


def pack(
    batch: Mapping[str, Tensor],
    position_ids: Tensor,
    is_picture: Tensor,
    pictures: Sequence[int],
    hidden_size: int = 4096,
    one_row: bool = False,
) -> PackedBatch:
    """Lay the sequences of a batch into rows. The last token of a sequence predicts nothing and is left out.

    Args:
        batch: (B, T) `input_ids` and `completion_mask`, right-padded, and further tensors of this shape.
        position_ids: (B, T), or (3, B, T) where a model has several for each token.
        is_picture: (B, T) bool, which tokens stand for pictures.
        pictures: of each sequence the number of its picture, or of its list of them: equal where the pictures are.
        hidden_size: of the model; the larger, the less a wide row costs beside what is done for each token by itself.
        one_row: lay everything into a single row, however wide.
    """
    ids, completion_mask = batch["input_ids"].cpu().numpy(), batch["completion_mask"].cpu().numpy().astype(bool)
    tokens = np.where(is_picture.cpu().numpy(), -1 - np.asarray(pictures)[:, None], ids)
    lengths = ids.shape[1] - 1 - completion_mask[:, ::-1].argmax(1)
    order = sorted(range(len(ids)), key=lambda i: tokens[i, : lengths[i]].tolist())
    shared = _shared_lengths(tokens[order], lengths[order], is_picture.cpu().numpy()[order])
    layout, width = _lay_out(order, shared, lengths, hidden_size, one_row)
    where = _places(layout, lengths, width, ids.shape)
    num_rows = layout[-1].row + 1
    predictors = torch.from_numpy(where[:, :-1][completion_mask[:, 1:]])
    keep = torch.zeros(num_rows * width, dtype=torch.bool)
    keep[predictors] = True
    shown = [laid.sequence for laid in layout if is_picture[laid.sequence, laid.shared :].any()]
    per_token = {name: value for name, value in batch.items() if value.shape == ids.shape}
    return PackedBatch(
        {
            name: _scatter(value, where, (num_rows, width))
            for name, value in {**per_token, "position_ids": position_ids}.items()
        },
        torch.from_numpy(_visible(layout, lengths, where, (num_rows, width))),
        keep.view(num_rows, width),
        (keep.cumsum(0) - 1)[predictors],
        shown,
    )


def _shared_lengths(tokens: np.ndarray, lengths: np.ndarray, is_picture: np.ndarray) -> np.ndarray:
    """How many first tokens each sorted sequence has in common with the one before it; pictures as a whole or not."""
    same = np.cumprod(tokens[1:] == tokens[:-1], axis=1).sum(1)
    shared = np.concatenate([[0], np.minimum(same, np.minimum(lengths[1:], lengths[:-1]))])
    behind_pictures = np.where(is_picture.any(1), is_picture.shape[1] - is_picture[:, ::-1].argmax(1), 0)
    return np.where(shared < behind_pictures, 0, shared)


def _lay_out(
    order: Sequence[int], shared: np.ndarray, lengths: np.ndarray, hidden_size: int, one_row: bool
) -> tuple[list[_Laid], int]:
    """Of a few widths of a row the cheapest; padding costs as much as any token.

    Beside what is done for a token by itself, attention over the width costs about width / (4 * hidden_size): measured
    on one thread, 4.2 for a hidden size of 64 and 7 for 512.
    """
    longest = int(lengths.max())
    widths = [int(lengths.sum())] if one_row else sorted({max(longest, w) for w in (*WIDTHS, longest, 2 * longest)})

    def num_rows(width: int) -> int:
        return _fill(order, shared, lengths, width)[-1].row + 1

    def cost(width: int) -> int:
        return num_rows(width) * width * (4 * hidden_size + width)

    def narrowest(width: int) -> int:
        """As many rows, no wider than they must be."""
        enough = num_rows(width)
        return longest + bisect_left(range(longest, width), -enough, key=lambda narrower: -num_rows(narrower))

    width = min(map(narrowest, widths), key=cost)
    return _fill(order, shared, lengths, width), width


def _fill(order: Sequence[int], shared: np.ndarray, lengths: np.ndarray, width: int) -> list[_Laid]:
    """Sequences one after the other; where one does not fit any more, a new row begins with the whole of it."""
    layout: list[_Laid] = []
    row = used = 0
    for i, common in zip(order, shared.tolist(), strict=True):
        length = int(lengths[i])
        if used + length - common > width:
            row, used, common = row + 1, 0, 0
        layout.append(_Laid(i, row, used, common))
        used += length - common
    return layout


def _places(layout: Sequence[_Laid], lengths: np.ndarray, width: int, shape: tuple[int, int]) -> np.ndarray:
    """(B, T) place of every token among the R * W; -1 for what is not laid out."""
    where = np.full(shape, -1)
    before = None
    for laid in layout:
        path, begin = where[laid.sequence], laid.row * width + laid.start
        if laid.shared:
            path[: laid.shared] = where[before, : laid.shared]
        path[laid.shared : lengths[laid.sequence]] = np.arange(begin, begin + lengths[laid.sequence] - laid.shared)
        before = laid.sequence
    return where


def _visible(layout: Sequence[_Laid], lengths: np.ndarray, where: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """(R, W, W) bool; padding sees itself, since a softmax over nothing is NaN."""
    num_rows, width = shape
    visible = np.zeros((num_rows, width, width), dtype=bool)
    visible[:, np.arange(width), np.arange(width)] = True
    for laid in layout:
        own = slice(laid.start, laid.start + lengths[laid.sequence] - laid.shared)
        visible[laid.row, own, where[laid.sequence, : laid.shared] % width] = True
        visible[laid.row, own, own] = np.tri(own.stop - own.start, dtype=bool)
    return visible


def _scatter(values: Tensor, where: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """(..., B, T) values of tokens as (..., R, W), zeros where there is none."""
    laid = torch.from_numpy(where >= 0)
    values = values.cpu()
    rows = values.new_zeros(*values.shape[:-2], shape[0] * shape[1])
    rows[..., torch.from_numpy(where[where >= 0])] = values[..., laid]
    return rows.view(*values.shape[:-2], *shape)
