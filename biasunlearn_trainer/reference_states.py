"""A reference's whole distributions, kept as what its output head was given.

The logits of N positions are (N, V), the hidden states just before the head (N, D), 10 to 60 times fewer numbers. They
are computed once, lie on disk and are read row by row; the frozen head makes logits of them again, which costs one
matrix product instead of a forward pass through all layers.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biasunlearn_trainer.completions import (
    CompletionOutput,
    completion_tokens,
    forward_completions,
    predicting_positions,
    unwrap,
)
from biasunlearn_trainer.kept_files import checksum

STATES_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
SAFETENSORS_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}


class StatesUnavailable(Exception):
    """Why a reference cannot be kept as hidden states; another form has to do."""


@dataclass
class StatesOutput:
    """What stands for a reference's `CompletionOutput`: N completion tokens of B sequences.

    Attributes:
        states: (N, D) what the head was given.
        head: the reference's output head, frozen.
        targets: (N,) ids of the completion tokens.
        mask: (B, K) bool, where the padded form holds a token.
    """

    states: Tensor
    head: nn.Module
    targets: Tensor
    mask: Tensor

    def logits_at(self, places: slice) -> Tensor:
        """(n, V) logits of some of the N positions; no gradient."""
        with torch.no_grad():
            return self.head(self.states[places])

    @property
    def logits(self) -> Tensor:
        """(N, V) logits of all positions; no gradient."""
        return self.logits_at(slice(None))


@dataclass
class HeldStates:
    """The states of a set's rows, one row behind the other in a memory-mapped file.

    Attributes:
        states: (sum of lengths, D), on disk.
        starts: (n,) where each row's states begin.
        lengths: (n,) how many positions each row has.
        logps: (n,) float32, log pi_ref of those positions' tokens, in nats.
    """

    states: Tensor
    starts: Tensor
    lengths: Tensor
    logps: Tensor

    @classmethod
    def of(cls, arrays: Mapping[str, Tensor]) -> HeldStates:
        """Those that a `StatesWriter` wrote, from the file's arrays."""
        return cls(arrays["states"], arrays["starts"], arrays["lengths"], arrays["logps"].float())

    @staticmethod
    def fault(arrays: Mapping[str, Tensor], num_rows: int) -> str | None:
        """Why arrays of a file are no states of so many rows."""
        shapes = {name: tuple(value.shape) for name, value in arrays.items()}
        expected = dict.fromkeys(("lengths", "starts", "logps"), (num_rows,))
        if {name: shape for name, shape in shapes.items() if name != "states"} != expected or "states" not in shapes:
            return f"it holds {shapes}, expected states and {expected}"
        total = int(arrays["lengths"].sum())
        return None if total == len(arrays["states"]) else f"it holds {shapes['states'][0]} states, expected {total}"

    def take(self, rows: Tensor) -> Tensor:
        """(N, D) the states of some rows, one row behind the other."""
        rows = rows.cpu()
        ranges = zip(self.starts[rows].tolist(), self.lengths[rows].tolist(), strict=True)
        return torch.cat([self.states[start : start + length] for start, length in ranges])


class StatesWriter:
    """Writes states as they come into one safetensors file; how many there are is known last, so the header is, too.

    Args:
        path: the file.
        num_rows: of the set.
        dtype: of the states.

    Raises:
        OSError: from the disk, in every method.
    """

    HEADER_BYTES = 16384

    def __init__(self, path: Path, num_rows: int, dtype: torch.dtype):
        self.path, self.dtype = path, dtype
        self._starts, self._lengths = (torch.zeros(num_rows, dtype=torch.long) for _ in range(2))
        self._logps = torch.zeros(num_rows, dtype=torch.double)  # 8 bytes as the others, which keeps all aligned
        self._shape, self._checksum = [0, 0], 0
        self._file = path.open("wb")
        self._file.seek(self.HEADER_BYTES + 24 * num_rows)

    def append(self, numbers: Tensor, lengths: Tensor, logps: Tensor, states: Tensor) -> None:
        """Write rows behind those that are there.

        Args:
            numbers: (B,) which rows.
            lengths: (B,) how many positions each has.
            logps: (B,) their log-probabilities, in nats.
            states: (N, D), row by row.
        """
        self._starts[numbers] = self._shape[0] + lengths.cumsum(0) - lengths
        self._lengths[numbers], self._logps[numbers] = lengths, logps.double()
        self._shape = [self._shape[0] + len(states), states.shape[-1]]
        self._checksum = checksum(states, self._checksum)
        self._file.write(_bytes(states))
        self._file.flush()

    def finish(self, metadata: Callable[[Mapping[str, int]], dict[str, str]]) -> None:
        """Write what comes before the states: the header, and where each row's begin.

        Args:
            metadata: makes the file's from checksums by array.
        """
        tables = {"starts": self._starts, "lengths": self._lengths, "logps": self._logps}
        checksums = {name: checksum(table) for name, table in tables.items()} | {"states": self._checksum}
        header: dict[str, Any] = {"__metadata__": metadata(checksums)}
        end = 0
        for name, kind, shape, size in (
            *((name, "F64" if table.is_floating_point() else "I64", [len(table)], 8) for name, table in tables.items()),
            ("states", SAFETENSORS_NAMES[self.dtype], self._shape, self.dtype.itemsize),
        ):
            start, end = end, end + math.prod(shape) * size
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
        said = json.dumps(header).encode().ljust(self.HEADER_BYTES - 8)
        self._file.seek(0)
        self._file.write(len(said).to_bytes(8, "little") + said)
        for table in tables.values():
            self._file.write(_bytes(table))
        self._file.close()

    def close(self) -> None:
        """Give the file back, whole or not."""
        with suppress(OSError):  # what is left to write does not matter any more
            self._file.close()


class StatesReference:
    """The reference as held states and the frozen head.

    Args:
        held: the stream's states.
        head: the reference's output head.
        dtype: what the head computes in; states that were kept in fewer bits go up to it.
    """

    def __init__(self, held: HeldStates, head: nn.Module, dtype: torch.dtype):
        self.held, self.head, self.dtype = held, head, dtype

    def logps(self, index: Tensor) -> Tensor:
        """(B,) reference log-probabilities of the rows `index`."""
        return self.held.logps[index.cpu()].to(index.device)

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> StatesOutput:
        """What the reference says on a stream's batch, without a forward pass.

        Raises:
            ValueError: the rows have other tokens than when their states were computed.
        """
        device = batch["input_ids"].device
        targets, mask = completion_tokens(batch)
        states = self.held.take(batch["index"]).to(device, self.dtype)
        if len(states) != len(targets):
            raise ValueError(
                f"Rows {batch['index'].tolist()} have {len(targets)} positions, their reference was computed with "
                f"{len(states)}. The collator's settings must not change between the two."
            )
        if next(self.head.parameters()).device != device:
            self.head.to(device)
        return StatesOutput(states, self.head, targets, mask)


def frozen_head(model: nn.Module) -> nn.Module:
    """A model's output head as it is now: itself where nothing of it is trained, else a frozen copy.

    A head that shares its weights with the embeddings is trained with them, and so copied.

    Raises:
        StatesUnavailable: the model names no head.
    """
    head = _head(model)
    if any(weight.requires_grad for weight in head.parameters()):
        return copy.deepcopy(head).eval().requires_grad_(False)
    return head


def forward_states(model: nn.Module, batch: dict[str, Tensor]) -> tuple[CompletionOutput, Tensor]:
    """Run the model once on a stream's batch, and keep what its head was given.

    Returns:
        The output, and the (N, D) states at the positions that predict a completion token.

    Raises:
        StatesUnavailable: the head does not turn these states into the model's logits, as where logits are scaled or
            capped behind it.
    """
    head, caught = _head(model), []
    hook = head.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        output = forward_completions(model, batch)
    finally:
        hook.remove()
    name = type(unwrap(model)).__name__
    if len(caught) != 1:
        raise StatesUnavailable(f"{name} calls its output head {len(caught)} times in one forward pass")
    states = caught[0]
    if states.dim() == 3 and states.shape[0] * states.shape[1] != len(output.targets):
        states = states[predicting_positions(batch["completion_mask"].bool())]
    states = states.reshape(-1, states.shape[-1])
    again = head(states)
    # Two products of other shapes differ by rounding; a scale or a cap by much more, wherever it matters.
    near = 1e-5 if output.logits.dtype in (torch.float32, torch.float64) else 2e-2
    if not torch.allclose(again, output.logits, rtol=near, atol=near * float(again.abs().max().clamp(min=1))):
        raise StatesUnavailable(f"{name} has something between its output head and its logits (a scale or a cap)")
    return output, states


def _head(model: nn.Module) -> nn.Module:
    head = unwrap(model).get_output_embeddings()
    if head is None:
        raise StatesUnavailable(f"{type(unwrap(model)).__name__} names no output head (get_output_embeddings)")
    return head


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data
