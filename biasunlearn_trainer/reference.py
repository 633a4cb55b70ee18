"""The reference policy: the model before unlearning, in whichever form costs least.

- `adapter`: the policy with its PEFT adapter switched off; no second model.
- `precomputed`: log pi_ref(y | x), one number per row, computed once, kept on disk and looked up by row number; for a
  KL the hidden states before the output head, memory-mapped (`reference_states`).
- `model`: a second model, frozen.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, tqdm
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import CompletionOutput, completion_tokens, forward_completions, text_positions
from biasunlearn_trainer.fingerprints import model_hash, processor_fingerprint, rows_fingerprint
from biasunlearn_trainer.models import evaluating, keeping_frozen, load_model
from biasunlearn_trainer.reference_states import (
    HeldStates,
    StatesReference,
    StatesUnavailable,
    forward_states,
    frozen_head,
)
from biasunlearn_trainer.sharding import inference_engine, is_partitioned, running
from biasunlearn_trainer.streams import dealt_batches

logger = logging.getLogger(__name__)

# Rows from whose lengths the size of a file is told before it is written.
SAMPLED_ROWS = 64

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
            _save({"logps": logps}, path)
        return logps

    def states(
        self, name: str, rows: Sequence[Mapping[str, Any]], positions: str, dtype: torch.dtype | None = None
    ) -> StatesReference:
        """The reference's hidden states of the rows, from disk where they are there, and its head.

        Args:
            name: of the stream.
            rows: its rows.
            positions: `completion`, or `all_text` for all but padding and image positions.
            dtype: how they are kept; the model's own where None.

        Raises:
            StatesUnavailable: the disk has no room, or the model's logits are not its head's output.
        """
        head, own = frozen_head(self.model), self.model.dtype
        kept = dtype or own
        settings = f"{self._key} {rows_fingerprint(rows)} {positions} {kept} states"
        key = hashlib.blake2b(settings.encode(), digest_size=12).hexdigest()
        table, path = self.cache_dir / f"{key}.safetensors", self.cache_dir / f"{key}.bin"
        self.accelerator.wait_for_everyone()
        fault = None
        if _is_whole(table, path, kept):
            logger.info("Reference hidden states of the %s set: %s", name, path)
        else:
            fault = self._write_states(name, rows, positions, kept, table, path)
            self.accelerator.wait_for_everyone()
        if fault is None and not _is_whole(table, path, kept):
            fault = f"{path} is not there on every machine: set reference_cache_dir to a folder that all of them see"
        faults = self._from_all(torch.tensor([int(fault is not None)], device=self.accelerator.device))
        if any(bool(found) for found in faults):
            raise StatesUnavailable(fault or "another process cannot read them")
        return StatesReference(HeldStates.open(path, load_file(table), kept), head, own)

    def _write_states(
        self, name: str, rows: Sequence[Mapping[str, Any]], positions: str, dtype: torch.dtype, table: Path, path: Path
    ) -> str | None:
        """Writes the file and its table; what went wrong, the same on every process, where something did."""
        state = self.accelerator
        fault = [self._no_room(name, rows, positions, dtype) if state.is_main_process else None]
        if state.num_processes > 1:
            broadcast_object_list(fault)
        if fault[0] is not None:
            return fault[0]
        partial = path.with_suffix(f".{os.getpid()}.partial")
        try:
            parts = self._compute_states(name, rows, positions, dtype, partial)
            if state.is_main_process:
                partial.replace(path)
                _save(parts, table)  # last: a table stands for a whole file
        except OSError as err:
            fault = [f"{path} could not be written ({err})"]
        finally:
            partial.unlink(missing_ok=True)
        if state.num_processes > 1:
            broadcast_object_list(fault)
        return fault[0]

    def _no_room(self, name: str, rows: Sequence[Mapping[str, Any]], positions: str, dtype: torch.dtype) -> str | None:
        """Says how large the file will be, and why it does not fit where it does not."""
        step = max(1, len(rows) // SAMPLED_ROWS)
        sample = range(0, len(rows), step)
        tokens = sum(len(completion_tokens(self._batch(rows, [i], positions))[0]) for i in sample) / len(sample)
        width = self.model.get_output_embeddings().weight.shape[-1]
        size = int(tokens * len(rows)) * width * dtype.itemsize
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache_dir).free
        about = "" if step == 1 else "about "
        said = f"Reference hidden states of the {name} set take {about}{size / 2**20:,.1f} MiB in {self.cache_dir}"
        if size > 0.95 * free:
            return f"{said}, and {free / 2**20:,.1f} MiB are free there (reference_cache_dir chooses another place)"
        logger.info("%s.", said)
        return None

    def _compute_states(
        self, name: str, rows: Sequence[Mapping[str, Any]], positions: str, dtype: torch.dtype, partial: Path
    ) -> dict[str, Tensor]:
        state, device = self.accelerator, next(self.model.parameters()).device
        batches = dealt_batches(rows, self.batch_size, state.process_index, state.num_processes)
        starts, lengths = (torch.zeros(len(rows), dtype=torch.long) for _ in range(2))
        logps, written, width, failed = torch.zeros(len(rows)), 0, 0, None
        with evaluating(self.model), partial.open("wb") as file:
            for batch_rows, counts in tqdm(batches, desc=f"Reference hidden states, {name} set"):
                batch = {key: value.to(device) for key, value in self._batch(rows, batch_rows, positions).items()}
                output, found = forward_states(self.model, batch)
                width = found.shape[-1]
                own = slice(None) if counts else slice(0)
                numbers = torch.tensor(batch_rows, device=device)
                sent = (numbers[own], output.lengths.long()[own], output.logps[own], found[own].to(dtype))
                for numbers, counted, sums, part in zip(*map(self._from_all, sent), strict=True):
                    numbers, counted = numbers.cpu(), counted.cpu()
                    starts[numbers] = written + counted.cumsum(0) - counted
                    lengths[numbers], logps[numbers] = counted, sums.cpu()
                    written += int(counted.sum())
                    if state.is_main_process and failed is None:
                        failed = _append(file, part)
                if failed is not None and state.num_processes == 1:
                    break  # with more of them, the others wait for this one at every batch
        if failed is not None:
            raise failed
        return {"starts": starts, "lengths": lengths, "logps": logps, "width": torch.tensor(width)}

    def _from_all(self, values: Tensor) -> list[Tensor]:
        """What each process has, (n, ...) with an n of its own."""
        state = self.accelerator
        if state.num_processes == 1:
            return [values]
        counts = state.gather(torch.tensor([len(values)], device=values.device)).tolist()
        widest = values.new_zeros(max(counts), *values.shape[1:])
        widest[: len(values)] = values
        every = state.gather(widest).view(state.num_processes, *widest.shape)
        return [part[:count] for part, count in zip(every, counts, strict=True)]

    def _batch(self, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], positions: str) -> dict[str, Tensor]:
        batch = self.collator([{**rows[i], "index": i} for i in numbers])
        if positions == "all_text":
            batch["completion_mask"] = text_positions(batch, self.collator.image_token_id)
        return batch

    def _compute(self, name: str, rows: Sequence[Mapping[str, Any]]) -> Tensor:
        state = self.accelerator
        device = next(self.model.parameters()).device
        logps = torch.zeros(len(rows), device=device)
        batches = dealt_batches(rows, self.batch_size, state.process_index, state.num_processes)
        with evaluating(self.model), running(self.model):
            for batch_rows, counts in tqdm(batches, desc=f"Reference log-probabilities, {name} set"):
                batch = self._batch(rows, batch_rows, "completion")
                batch = {key: value.to(device) for key, value in batch.items()}
                found = forward_completions(self.model, batch).logps
                if counts:
                    logps[torch.tensor(batch_rows, device=device)] = found
        return state.reduce(logps, "sum").cpu()


def _save(parts: dict[str, Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial-table")
    save_file(parts, partial)
    partial.chmod(0o644)  # safetensors keeps a new file to its owner, and caches are shared
    partial.replace(path)


def _is_whole(table: Path, path: Path, dtype: torch.dtype) -> bool:
    """Whether a table and its file of states are there, the file as long as the table says."""
    if not (table.is_file() and path.is_file()):
        return False
    parts = load_file(table)
    return path.stat().st_size == int(parts["lengths"].sum() * parts["width"]) * dtype.itemsize


def _append(file: Any, states: Tensor) -> OSError | None:
    """Writes states behind those that are there; the error where that fails."""
    try:
        file.write(states.contiguous().cpu().view(torch.uint8).numpy().data)
        file.flush()
    except OSError as err:
        return err
    return None
