"""The reference policy: the model before unlearning, in whichever form costs least.

- `adapter`: the policy with its PEFT adapter switched off; no second model.
- `precomputed`: log pi_ref(y | x), one number per row, computed once, kept on disk and looked up by row number.
- `model`: a second model, frozen.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import CompletionOutput, forward_completions
from biasunlearn_trainer.fingerprints import model_hash, processor_fingerprint, rows_fingerprint
from biasunlearn_trainer.models import evaluating, keeping_frozen, load_model
from biasunlearn_trainer.sharding import inference_engine, is_partitioned, running
from biasunlearn_trainer.streams import dealt_batches

logger = logging.getLogger(__name__)

MODES = ("auto", "adapter", "precomputed", "model")


class AdapterReference:
    """The policy's own base weights, under its switched-off adapter."""

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> CompletionOutput:
        """One forward pass of the reference over a stream's batch."""
        policy = model.module if hasattr(model, "module") else model
        with keeping_frozen(policy), evaluating(policy), policy.disable_adapter():
            return forward_completions(policy, batch)


class ModelReference:
    """A second, frozen model.

    Args:
        model: the reference; `of` makes a copy of a policy.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self._engine = inference_engine(model) if is_partitioned(model) else None

    @classmethod
    def of(cls, policy: nn.Module) -> ModelReference:
        """A copy of the policy as it is now.

        Raises:
            ValueError: its weights are partitioned, so that they are loaded once more, and are not the policy's.
        """
        if not is_partitioned(policy):
            return cls(copy.deepcopy(policy))
        name = policy.config._name_or_path
        loaded = load_model(name, dtype=policy.dtype)
        if model_hash(loaded) != model_hash(policy):
            raise ValueError(
                f"Under ZeRO-3 the reference is loaded once more from {name!r}, and what lies there is not the policy "
                "as it was given. Save the policy and load it from there, or give a reference_model."
            )
        return cls(loaded)

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> CompletionOutput:
        """One forward pass of the reference over a stream's batch."""
        device = batch["input_ids"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        with torch.no_grad():
            return forward_completions(self.model, batch)


class PrecomputedReference:
    """The log pi_ref(y | x) of a stream by row number.

    Args:
        table: (n,) float32, in nats.
    """

    def __init__(self, table: Tensor):
        self.table = table

    def logps(self, index: Tensor) -> Tensor:
        """(B,) reference log-probabilities of the rows `index`."""
        self.table = self.table.to(index.device)
        return self.table[index]


class ReferenceBuilder:
    """Compute log pi_ref(y | x) for whole sets, once, and keep it on disk.

    Args:
        model: the reference, unwrapped.
        collator: the one that training uses; it decides what the model sees.
        accelerator: rows are shared out among its processes.
        batch_size: rows in one forward pass.
        cache_dir: where tables are kept; None for `cache_home() / "references"`.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: CompletionCollator,
        accelerator: Accelerator,
        batch_size: int,
        cache_dir: str | Path | None = None,
    ):
        self.model, self.collator, self.accelerator, self.batch_size = model, collator, accelerator, batch_size
        self.cache_dir = Path(cache_dir) if cache_dir else cache_home() / "references"
        settings = f"{collator.max_length} {collator.append_eos} {processor_fingerprint(collator.processing_class)}"
        self._key = f"{model_hash(model)} {settings}"

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        """(n,) float32 reference log-probabilities of the rows, from disk where they are there.

        The key holds the model's weights, the rows, the processor and the collator's settings: whatever changes
        makes a new table.
        """
        key = hashlib.blake2b(f"{self._key} {rows_fingerprint(rows)}".encode(), digest_size=12).hexdigest()
        path = self.cache_dir / f"{key}.safetensors"
        self.accelerator.wait_for_everyone()
        if path.is_file():
            logger.info("Reference log-probabilities of the %s set: %s", name, path)
            return load_file(path)["logps"]
        logps = self._compute(name, rows)
        if self.accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"logps": logps}, partial)
            partial.chmod(0o644)  # safetensors keeps a new file to its owner, and caches are shared
            partial.replace(path)
        return logps

    def _compute(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        state = self.accelerator
        device = next(self.model.parameters()).device
        logps = torch.zeros(len(rows), device=device)
        batches = dealt_batches(rows, self.batch_size, state.process_index, state.num_processes)
        with evaluating(self.model), running(self.model):
            for batch_rows, counts in tqdm(batches, desc=f"Reference log-probabilities, {name} set"):
                batch = self.collator([{**rows[i], "index": i} for i in batch_rows])
                batch = {key: value.to(device) for key, value in batch.items()}
                found = forward_completions(self.model, batch).logps
                if counts:
                    logps[torch.tensor(batch_rows, device=device)] = found
        return state.reduce(logps, "sum").cpu()
