"""What a reference says of whole sets, computed once and kept on disk: log-probabilities, or hidden states."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object, tqdm
from torch import Tensor, nn

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import completion_tokens, forward_completions, text_positions
from biasunlearn_trainer.fingerprints import model_parts, rows_fingerprint
from biasunlearn_trainer.kept_files import KeptFile, everywhere, replacing
from biasunlearn_trainer.models import evaluating
from biasunlearn_trainer.reference_states import (
    HeldStates,
    StatesReference,
    StatesUnavailable,
    StatesWriter,
    forward_states,
    frozen_head,
)
from biasunlearn_trainer.sharding import running
from biasunlearn_trainer.streams import dealt_batches

logger = logging.getLogger(__name__)

# Rows from whose lengths the size of a file is told before it is written.
SAMPLED_ROWS = 64

Rows = Sequence[Mapping[str, Any]]


class ReferenceBuilder:
    """Compute what the reference says of whole sets, once, and keep it on disk.

    Args:
        model: the reference, unwrapped.
        collator: the one that training uses; it decides what the model sees.
        accelerator: rows are shared out among its processes.
        batch_size: rows in one forward pass.
        cache_dir: where files are kept; None for `cache_home() / "references"`.
        weights: `model_hash` of the reference, where it is known.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: CompletionCollator,
        accelerator: Accelerator,
        batch_size: int,
        cache_dir: str | Path | None = None,
        weights: str | None = None,
    ):
        self.model, self.collator, self.accelerator, self.batch_size = model, collator, accelerator, batch_size
        self.cache_dir = Path(cache_dir) if cache_dir else cache_home() / "references"
        self._parts = {
            **model_parts(model, collator.processing_class, weights),
            "max_length": str(collator.max_length),
            "append_eos": str(collator.append_eos),
        }

    def table(self, name: str, rows: Rows) -> Tensor:
        """(n,) float32 reference log-probabilities of the rows, from disk where they are there.

        Args:
            name: of the stream.
            rows: its rows.
        """
        kept = self._kept("reference log-probabilities", name, rows)
        found = self._found(kept, lambda arrays: _other_length({"logps": len(rows)}, arrays))
        if found is not None:
            return found["logps"]
        logps = self._compute(name, rows)
        if self.accelerator.is_local_main_process:
            kept.save({"logps": logps})
        return logps

    def states(self, name: str, rows: Rows, positions: str, dtype: torch.dtype | None = None) -> StatesReference:
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
        dtype = dtype or own
        more = {"positions": positions, "dtype": str(dtype).removeprefix("torch.")}
        kept = self._kept("reference hidden states", name, rows, more)
        found = self._found(kept, lambda arrays: HeldStates.fault(arrays, len(rows)))
        if found is None:
            self._write_states(kept, rows, positions, dtype)
            self.accelerator.wait_for_everyone()
            found = self._found(kept, lambda arrays: HeldStates.fault(arrays, len(rows)))
        if found is None:
            raise StatesUnavailable(f"What was written to {kept.path} cannot be read on every machine")
        return StatesReference(HeldStates.of(found), head, own)

    def _kept(self, kind: str, name: str, rows: Rows, more: Mapping[str, str] | None = None) -> KeptFile:
        said = f"{len(rows)} with digest {rows_fingerprint(rows)}"
        parts = self._parts | {"rows": said} | (more or {})
        return KeptFile(self.cache_dir, kind, f"{name} set", parts, self.accelerator.is_local_main_process)

    def _found(self, kept: KeptFile, check: Any) -> dict[str, Tensor] | None:
        """What the file holds, where every process can read it on its machine."""
        self.accelerator.wait_for_everyone()  # none may look while another still writes
        found = kept.load(check)
        return found[0] if everywhere(self.accelerator, found is not None) else None

    def _write_states(self, kept: KeptFile, rows: Rows, positions: str, dtype: torch.dtype) -> None:
        """Computes the states; one process of each machine writes them, or of all machines that share the folder.

        Raises:
            StatesUnavailable: on every process, with what went wrong on one of them.
        """
        fault = None
        try:
            with ExitStack() as opened:
                writer, fault = self._writer(opened, kept, rows, positions, dtype)
                self._agree(fault)
                self._compute_states(kept, rows, positions, dtype, writer)
                if writer is not None:
                    writer.finish(kept.metadata)
        except OSError as err:
            fault = f"{kept.path} could not be written ({err})"
        self._agree(fault)

    def _writer(
        self, opened: ExitStack, kept: KeptFile, rows: Rows, positions: str, dtype: torch.dtype
    ) -> tuple[StatesWriter | None, str | None]:
        """What writes on this process, if it is one that does, or why it cannot; every process has to call it."""

        def begin() -> tuple[StatesWriter | None, str | None]:
            try:
                self._check_room(kept, rows, positions, dtype)
                writer = StatesWriter(opened.enter_context(replacing(kept.path)), len(rows), dtype)
            except (OSError, StatesUnavailable) as err:
                return None, str(err)
            opened.callback(writer.close)
            return writer, None

        state = self.accelerator
        writer, fault = begin() if state.is_main_process else (None, None)
        if state.num_processes > 1:  # whoever sees the main process's file shares its folder
            (of_main,) = broadcast_object_list([writer and writer.path.name])
            if state.is_local_main_process and of_main and not (self.cache_dir / of_main).exists():
                writer, fault = begin()
        return writer, fault

    def _check_room(self, kept: KeptFile, rows: Rows, positions: str, dtype: torch.dtype) -> None:
        """Says how large the file will be, and raises StatesUnavailable where it does not fit."""
        step = max(1, len(rows) // SAMPLED_ROWS)
        sample = range(0, len(rows), step)
        tokens = sum(len(completion_tokens(self._batch(rows, [i], positions))[0]) for i in sample) / len(sample)
        width = self.model.get_output_embeddings().weight.shape[-1]
        size = int(tokens * len(rows)) * width * dtype.itemsize
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.cache_dir).free
        about = "" if step == 1 else "about "
        said = f"Reference hidden states of the {kept.of} take {about}{size / 2**20:,.1f} MiB in {self.cache_dir}"
        if size > 0.95 * free:
            raise StatesUnavailable(
                f"{said}, and {free / 2**20:,.1f} MiB are free there (reference_cache_dir chooses another place)"
            )
        logger.info("%s.", said)

    def _compute_states(
        self, kept: KeptFile, rows: Rows, positions: str, dtype: torch.dtype, writer: StatesWriter | None
    ) -> None:
        state, device = self.accelerator, next(self.model.parameters()).device
        batches = dealt_batches(rows, self.batch_size, state.process_index, state.num_processes)
        fault = None
        with evaluating(self.model):
            for batch_rows, counts in tqdm(batches, desc=f"Reference hidden states, {kept.of}"):
                batch = {key: value.to(device) for key, value in self._batch(rows, batch_rows, positions).items()}
                try:
                    output, found = forward_states(self.model, batch)
                except StatesUnavailable as why:
                    fault = str(why)
                if not everywhere(state, fault is None):
                    break
                own = slice(None) if counts else slice(0)
                numbers = torch.tensor(batch_rows, device=device)
                sent = (numbers[own], output.lengths.long()[own], output.logps[own], found[own].to(dtype))
                for parts in zip(*map(self._from_all, sent), strict=True):
                    try:
                        if writer is not None and fault is None:
                            writer.append(*(part.cpu() for part in parts))
                    except OSError as err:
                        fault = f"{kept.path} could not be written ({err})"
        self._agree(fault)

    def _agree(self, fault: str | None) -> None:
        """Raises StatesUnavailable on every process where one of them has a fault; all have to call it."""
        faults = gather_object([fault]) if self.accelerator.num_processes > 1 else [fault]
        if first := next((found for found in faults if found), None):
            raise StatesUnavailable(first)

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

    def _batch(self, rows: Rows, numbers: Sequence[int], positions: str) -> dict[str, Tensor]:
        batch = self.collator([{**rows[i], "index": i} for i in numbers])
        if positions == "all_text":
            batch["completion_mask"] = text_positions(batch, self.collator.image_token_id)
        return batch

    def _compute(self, name: str, rows: Rows) -> Tensor:
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


def _other_length(expected: Mapping[str, int], arrays: Mapping[str, Tensor]) -> str | None:
    found = {name: len(value) for name, value in arrays.items()}
    return None if found == expected else f"it holds {found}, expected {expected}"
