"""From two sets of rows to a mask, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from torch import Tensor, nn

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.fingerprints import (
    DIGEST_BYTES,
    model_hash,
    model_parts,
    processor_fingerprint,
    rows_fingerprint,
)
from biasunlearn_trainer.kept_files import KeptFile, everywhere
from biasunlearn_trainer.models import without_dropout
from biasunlearn_trainer.orders import order
from biasunlearn_trainer.saliency.fisher import PerSampleFisher, add_squared_gradients, empty_sums
from biasunlearn_trainer.saliency.masks import SaliencyMask
from biasunlearn_trainer.streams import modality_batches
from biasunlearn_trainer.version import __version__

logger = logging.getLogger(__name__)

FISHERS = ("per_sample", "per_batch")
SETS = ("target", "preserve")
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SaliencySettings:
    """How a mask is made.

    Attributes:
        threshold: smallest ratio S_T / S_P of a salient weight, above 0 (the paper: 1).
        fisher: `per_sample`, the mean over rows of squared gradients; or `per_batch`, the mean over micro-batches of
            the squared gradient of their mean loss, as in MMUnlearner's published code.
        batch_size: rows of a micro-batch. Of `per_sample` it sets the memory for activations alone.
        epsilon: smallest Fisher value that is told from 0, above 0.
        batched: let `per_sample` take the rows of a micro-batch in one backward pass; else one by one.
        one_pass: keep S_T in memory while S_P is made. Else it waits in a file of 4 bytes a weight.
        seed: in what order rows make up micro-batches.
    """

    threshold: float = 1.0
    fisher: str = "per_sample"
    batch_size: int = 4
    epsilon: float = 1e-30
    batched: bool = True
    one_pass: bool = False
    seed: int = 0

    def __post_init__(self):
        faults = [
            f"`saliency_{name}` must be above 0, got {getattr(self, name)}."
            for name in ("threshold", "epsilon", "batch_size")
            if not getattr(self, name) > 0
        ]
        if self.fisher not in FISHERS:
            faults.append(f"`saliency_fisher` must be one of {', '.join(FISHERS)}; got {self.fisher!r}.")
        if faults:
            raise ValueError("\n".join(faults))

    @property
    def rows_at_once(self) -> int:
        """Rows of one backward pass."""
        return self.batch_size if self.batched or self.fisher == "per_batch" else 1


def weights_digest(model: nn.Module) -> str:
    """Digest of the weights that gradients depend on: a LoRA adapter counts even where it changes nothing yet."""
    return model_hash(model, skip_fresh_adapter=False)


class SaliencyBuilder:
    """Make masks for a model as it is now.

    Args:
        model: unwrapped; its trainable weights get a mask. In the end its weights, gradients and modes are as before.
        collator: the one that training uses.
        accelerator: rows are shared out among its processes.
        settings: see `SaliencySettings`.
        cache_dir: where masks are kept; None for `cache_home() / "saliency"`.
        weights: `weights_digest` of the model, where it is known.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: CompletionCollator,
        accelerator: Accelerator,
        settings: SaliencySettings,
        cache_dir: str | Path | None = None,
        weights: str | None = None,
    ):
        self.model, self.collator, self.accelerator, self.settings = model, collator, accelerator, settings
        self.cache_dir = Path(cache_dir) if cache_dir else cache_home() / "saliency"
        self.digest = weights or weights_digest(model)

    def mask(self, target: Rows, preserve: Rows) -> SaliencyMask:
        """The mask of what is to be forgotten against what is to be preserved, from disk where it is there.

        Args:
            target: T, the forget set.
            preserve: P; in MMUnlearner the text questions about the forgotten, and all questions about the others.

        Returns:
            The mask of every trainable weight.
        """
        provenance, state = self._provenance(target, preserve), self.accelerator
        kept = KeptFile(self.cache_dir, "saliency mask", "run", self._parts(provenance), state.is_local_main_process)
        state.wait_for_everyone()
        found = kept.load()
        if everywhere(state, found is not None):
            return SaliencyMask.of(*found)
        mask = self._build(target, preserve)
        mask.provenance = provenance
        state.wait_for_everyone()
        if state.is_local_main_process:
            kept.save(mask.bits, mask.metadata())
        return mask

    def _provenance(self, target: Rows, preserve: Rows) -> dict[str, Any]:
        collator = self.collator
        processor = processor_fingerprint(collator.processing_class)
        return {
            "kind": "fisher",
            "model": self.digest,
            "dtypes": {
                name: str(value.dtype).removeprefix("torch.")
                for name, value in self.model.named_parameters()
                if value.requires_grad
            },
            "settings": asdict(self.settings),
            "target": {"rows": len(target), "fingerprint": rows_fingerprint(target)},
            "preserve": {"rows": len(preserve), "fingerprint": rows_fingerprint(preserve)},
            "collation": f"{collator.max_length} {collator.append_eos} {processor}",
            "version": __version__,
        }

    def _parts(self, provenance: Mapping[str, Any]) -> dict[str, str]:
        # Whether S_T waits on disk or in memory does not change the mask, nor how many rows are taken at once.
        speed = {"one_pass", "batched", *(["batch_size"] if self.settings.fisher == "per_sample" else [])}
        sets = {name: f"{provenance[name]['rows']} with digest {provenance[name]['fingerprint']}" for name in SETS}
        trained = json.dumps(sorted(provenance["dtypes"].items())).encode()
        return {
            **model_parts(self.model, self.collator.processing_class, provenance["model"]),
            "trained weights": hashlib.blake2b(trained, digest_size=DIGEST_BYTES).hexdigest(),
            "max_length": str(self.collator.max_length),
            "append_eos": str(self.collator.append_eos),
            "target rows": sets["target"],
            "preserve rows": sets["preserve"],
            "version": provenance["version"],
            **{name: str(value) for name, value in provenance["settings"].items() if name not in speed},
        }

    def _build(self, target: Rows, preserve: Rows) -> SaliencyMask:
        sums = empty_sums(self.model)
        mask, settings = SaliencyMask.empty(), self.settings
        per_sample = PerSampleFisher(self.model, self._collate, sums)
        with without_dropout(self.model):
            self._measure("target", target, sums, per_sample)
            with self._put_aside(sums) as of_target:
                self._measure("preserve", preserve, sums, per_sample)
                for name, of_preserve in sums.items():
                    mask.compare(name, of_target[name], of_preserve, settings.threshold, settings.epsilon)
        return mask

    def _measure(self, name: str, rows: Rows, sums: dict[str, Tensor], per_sample: PerSampleFisher) -> None:
        """Fill `sums` with the Fisher diagonal on a set: the mean over its rows or its micro-batches."""
        state = self.accelerator
        shuffled = order(len(rows), self.settings.seed, "saliency", name)
        batches = modality_batches(rows, self.settings.rows_at_once, shuffled)
        for numbers in tqdm(batches[state.process_index :: state.num_processes], desc=f"Saliency, {name} set"):
            chosen = [{**rows[i], "index": i} for i in numbers]
            if self.settings.fisher == "per_sample":
                per_sample.add(chosen)
            else:
                add_squared_gradients(self.model, self._collate(chosen), sums)
        for value in sums.values():
            if state.num_processes > 1:
                value.copy_(state.reduce(value, "sum"))
            value /= len(rows) if self.settings.fisher == "per_sample" else len(batches)

    def _collate(self, rows: Rows) -> dict[str, Tensor]:
        batch = self.collator(rows)
        batch["num_images"] = torch.tensor([len(row.get("images") or []) for row in rows])
        device = next(self.model.parameters()).device
        return {key: value.to(device) for key, value in batch.items()}

    @contextmanager
    def _put_aside(self, sums: dict[str, Tensor]) -> Iterator[Mapping[str, Tensor | np.ndarray]]:
        """Keep the sums, flat, as they are, in memory or in a file, and set them back to 0."""
        if self.settings.one_pass:
            kept = {name: value.flatten().clone() for name, value in sums.items()}
            _clear(sums)
            yield kept
            return
        with ExitStack() as opened:
            try:
                mapped = self._written(opened, sums)
            except OSError as err:
                logger.warning(
                    "The Fisher values of the target set cannot wait in %s (%s): they wait in memory, %.1f MiB more.",
                    self.cache_dir,
                    err,
                    sum(value.nbytes for value in sums.values()) / 2**20,
                )
                mapped = {name: value.flatten().clone() for name, value in sums.items()}
            _clear(sums)
            yield mapped

    def _written(self, opened: ExitStack, sums: Mapping[str, Tensor]) -> Mapping[str, np.ndarray]:
        """The sums in a file without a name, which is gone when it is closed."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with ExitStack() as own:
            file = own.enter_context(tempfile.TemporaryFile(dir=self.cache_dir, prefix="fisher-"))
            for value in sums.values():
                file.write(value.cpu().numpy().data)
            file.flush()
            mapped = np.memmap(file, dtype=np.float32, mode="c")  # copy on write: the file is only read
            opened.push(own.pop_all())
        ends = np.cumsum([value.numel() for value in sums.values()])
        return {name: mapped[end - value.numel() : end] for (name, value), end in zip(sums.items(), ends, strict=True)}


def _clear(sums: Mapping[str, Tensor]) -> None:
    for value in sums.values():
        value.zero_()
