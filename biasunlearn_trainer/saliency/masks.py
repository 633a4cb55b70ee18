"""A saliency mask: one bit for each weight, where it came from, and whether it fits a model."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from biasunlearn_trainer.kept_files import replacing

FORMAT = "biasunlearn_trainer saliency mask 1"
# Weights compared at once: the largest matrix of a 7B model has 131 million, and float32 logarithms of all of them
# would need more memory than the largest gradient did.
AT_ONCE = 1 << 22
NAMES_SHOWN = 5


def salient(target: Tensor, preserve: Tensor, threshold: float, epsilon: float) -> Tensor:
    """Which weights matter more for what is to be forgotten than for what is to stay.

    m = 1[S_T / S_P >= threshold], compared as logarithms, with S_P no smaller than epsilon. A weight with S_T no larger
    than epsilon is never salient, so 0/0 is not.

    Args:
        target: S_T, the Fisher diagonal on the forget set, any shape.
        preserve: S_P, the one on what is to be preserved, of the same shape.
        threshold: smallest ratio that counts, above 0 (the paper: 1).
        epsilon: smallest Fisher value, above 0, that is told from 0.

    Returns:
        bool, of the same shape.

    Source: MMUnlearner, arXiv 2502.11051, eq. 7.

    Example:
        >>> s_t, s_p = torch.tensor([4.0, 1.0, 0.0, 1.0]), torch.tensor([1.0, 4.0, 0.0, 0.0])
        >>> salient(s_t, s_p, threshold=1.0, epsilon=1e-30).tolist()
        [True, False, False, True]
    """
    ratio = target.log() - preserve.clamp_min(epsilon).log()
    return (ratio >= math.log(threshold)) & (target > epsilon)


@dataclass
class SaliencyMask:
    """Which weights of a model are salient.

    Attributes:
        bits: by the weight's name, its mask as uint8, 8 weights a byte, the first in the lowest bit.
        shapes: by name, the weight's shape.
        provenance: what the mask was made of: `kind`, `model` (digest of its weights), `dtypes` by name, settings and
            fingerprints.
    """

    bits: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def empty(cls) -> SaliencyMask:
        """A mask of no weight, to be filled with `put`."""
        return cls({}, {})

    def put(self, name: str, mask: Tensor) -> None:
        """Set the bits of one weight.

        Args:
            name: the weight's name.
            mask: bool, in the weight's shape.
        """
        self.shapes[name] = tuple(mask.shape)
        self.bits[name] = torch.from_numpy(np.packbits(mask.flatten().cpu().numpy(), bitorder="little"))

    def get(self, name: str) -> Tensor:
        """bool, in the weight's shape: which of its elements are salient."""
        shape = self.shapes[name]
        flat = np.unpackbits(self.bits[name].numpy(), count=math.prod(shape), bitorder="little")
        return torch.from_numpy(flat).view(torch.bool).view(shape)

    def compare(
        self, name: str, target: Tensor | np.ndarray, preserve: Tensor, threshold: float, epsilon: float
    ) -> None:
        """Set the bits of one weight from its Fisher values, piece by piece; see `salient`.

        Args:
            name: the weight's name.
            target: (n,) S_T of its n elements; an array may lie in a file, and is read piece by piece.
            preserve: S_P, in the weight's shape.
            threshold: as for `salient`.
            epsilon: as for `salient`.
        """
        flags = np.empty(len(target), dtype=bool)
        for start in range(0, len(target), AT_ONCE):
            piece = slice(start, start + AT_ONCE)
            s_p = preserve.flatten()[piece]
            s_t = torch.as_tensor(target[piece], device=s_p.device)
            flags[piece] = salient(s_t, s_p, threshold, epsilon).cpu().numpy()
        self.put(name, torch.from_numpy(flags).view(preserve.shape))

    def count(self, name: str) -> int:
        """How many elements of a weight are salient."""
        return int(np.bitwise_count(self.bits[name].numpy()).sum())

    @property
    def num_weights(self) -> int:
        """Elements of all weights that the mask covers."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    @property
    def num_salient(self) -> int:
        """Salient elements of all weights."""
        return sum(self.count(name) for name in self.bits)

    @property
    def density(self) -> float:
        """Share of the covered elements that are salient, 0 to 1."""
        return self.num_salient / max(1, self.num_weights)

    def shuffled(self, seed: int) -> SaliencyMask:
        """The control: in each weight as many elements as here, drawn at random.

        Args:
            seed: draws differ by it, and are the same for it on every machine.
        """
        shuffled = SaliencyMask.empty()
        for number, name in enumerate(sorted(self.bits)):
            flags = self.get(name).flatten().numpy()
            np.random.default_rng([seed, number]).shuffle(flags)
            shuffled.put(name, torch.from_numpy(flags).view(self.shapes[name]))
        shuffled.provenance = {**self.provenance, "kind": "random", "seed": seed}
        return shuffled

    def metadata(self) -> dict[str, str]:
        """What a file says beside the bits: its format, shapes and provenance."""
        return {"format": FORMAT, "shapes": json.dumps(self.shapes), "provenance": json.dumps(self.provenance)}

    @classmethod
    def of(cls, bits: Mapping[str, Tensor], metadata: Mapping[str, str]) -> SaliencyMask:
        """A mask from its file's bits and metadata."""
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata["shapes"]).items()}
        return cls(dict(bits), shapes, json.loads(metadata["provenance"]))

    def save(self, path: str | os.PathLike) -> None:
        """Write the mask as safetensors; names, shapes and provenance stand in the file's metadata."""
        with replacing(Path(path)) as partial:
            save_file(self.bits, partial, self.metadata())

    @classmethod
    def load(cls, path: str | os.PathLike) -> SaliencyMask:
        """Read a mask.

        Raises:
            OSError: where there is no such file.
            ValueError: where it is no mask.
        """
        if not Path(path).is_file():
            raise OSError(
                f"There is no saliency mask {path}. `python -m biasunlearn_trainer.saliency RECIPE` builds one."
            )
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                bits = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except Exception as err:  # safetensors raises its own SafetensorError, which derives from Exception alone
            raise ValueError(f"{path} is no safetensors file: {err}") from err
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no saliency mask: its metadata say format {metadata.get('format')!r}.")
        return cls.of(bits, metadata)

    def check(self, model: nn.Module, digest: str) -> None:
        """Refuse a model that the mask was not made for.

        Args:
            model: with the trainable weights of the run.
            digest: of its weights, from `weights_digest`.

        Raises:
            ValueError: listing the trainable weights without an entry, of another shape or type, the entries without a
                weight, and other weights under the same names.
        """
        faults = list(self._faults(dict(model.named_parameters())))
        made_for = self.provenance.get("model")
        if not faults and made_for is not None and made_for != digest:
            faults = [f"it was made from weights with the digest {made_for}, the model's are {digest}"]
        if faults:
            more = [f"and {len(faults) - NAMES_SHOWN} more"] if len(faults) > NAMES_SHOWN else []
            raise ValueError(
                "The saliency mask was made for another model: "
                + "; ".join([*faults[:NAMES_SHOWN], *more])
                + ". Build it for this model, with the same trainable groups: `python -m biasunlearn_trainer.saliency`."
            )

    def _faults(self, parameters: Mapping[str, Tensor]) -> Iterator[str]:
        dtypes = self.provenance.get("dtypes", {})
        for name, value in parameters.items():
            if not value.requires_grad:
                continue
            dtype = str(value.dtype).removeprefix("torch.")
            if name not in self.shapes:
                yield f"the trainable weight {name} has no entry"
            elif self.shapes[name] != tuple(value.shape):
                yield f"{name} has shape {tuple(value.shape)}, its mask {self.shapes[name]}"
            elif dtypes.get(name, dtype) != dtype:
                yield f"{name} is {dtype}, its mask was made from {dtypes[name]}"
        yield from (
            f"it has an entry for {name}, the model no such weight" for name in self.shapes.keys() - parameters.keys()
        )
