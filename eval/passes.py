"""Forward passes over many rows, what they begin with computed once.

Batches are formed over all rows, and dealt whole to the processes: batch i goes to rank i mod world. Each batch is
therefore the same for any number of processes, and so are the scores in it. Rows that begin alike, with the same
picture or the same words, come into one batch, where what they share is computed once (`shared_prefixes`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import extract_model_from_parallel, gather_object
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.eval.batches import Outline, Row, batches_by_length, batches_by_prefix, outlines
from biasunlearn_trainer.models import evaluating, image_token_id, tokenizer_of
from biasunlearn_trainer.shared_prefixes import (
    SharedOutput,
    cannot_share,
    compare_with_plain,
    forward_plain,
    forward_shared,
    longest_shared,
)
from biasunlearn_trainer.streams import dealt

logger = logging.getLogger(__name__)

# How many rows are scored both with and without shared prefixes before the others are scored with them.
COMPARED_ROWS = 3


class Passes:
    """Runs a model over rows, in evaluation mode and without gradients.

    Args:
        model: a causal or image-text model, also wrapped for data parallelism, on the device where it is to run.
        processing_class: its tokenizer, or its processor where rows carry images.
        batch_size: rows of one forward pass.
        share_prefixes: compute once what rows of a batch begin with, pictures included. The first rows of a kind (with
            pictures, without) are run in both ways; where a model does not give the same, all go one by one.

    Attributes:
        num_tokens: how many tokens went through the language model in this process, padding included; those of
            generated answers are not counted.
        why_apart: of rows with (True) and without (False) pictures, why their prefixes are not shared; None where they
            are. A kind that was not met yet is not in here.

    With several processes every process must make the same calls with the same rows; all get all results.
    """

    def __init__(
        self,
        model: nn.Module,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        batch_size: int,
        share_prefixes: bool,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.model = extract_model_from_parallel(model)
        self.processing_class = processing_class
        self.tokenizer = tokenizer_of(processing_class)
        self.batch_size = batch_size
        self.share_prefixes = share_prefixes
        self.num_tokens = 0
        self.why_apart: dict[bool, str | None] = {}
        self._image_token_id = image_token_id(processing_class)

    def over_batches(
        self,
        rows: Sequence[Row],
        work: Callable[[list[Row]], list],
        desc: str | None,
        batch_size: int | None = None,
        collator: CompletionCollator | None = None,
    ) -> list:
        """Deal the batches, and give every process the results of all rows.

        Args:
            rows: all of them.
            work: gives the results of a batch's rows.
            desc: title of a progress bar on the main process; None shows none.
            batch_size: another one than the usual.
            collator: how rows become tensors, where their prefixes may be shared; None where they may not.
        """
        state = PartialState()
        done: list[tuple[int, Any]] = []
        bar = tqdm(total=len(rows), desc=desc, leave=False, disable=desc is None or not state.is_main_process)
        with evaluating(self.model), bar:
            for batches in self._batches(rows, batch_size or self.batch_size, collator):
                for batch, counts in dealt(batches, state.process_index, state.num_processes):
                    outputs = work([rows[index] for index in batch])
                    done += zip(batch, outputs, strict=True) if counts else ()
                    bar.update(min(len(batch) * state.num_processes, bar.total - bar.n))
        results = dict(gather_object(done))
        return [results[index] for index in range(len(rows))]

    def forward(self, collator: CompletionCollator, rows: list[Row]) -> SharedOutput:
        """The completions of a batch, with shared prefixes where rows of its kind may have them."""
        batch = self._collate(collator, rows)
        apart = self.why_apart.get(bool(batch["num_images"].any()), "not met")
        if not self.share_prefixes or apart or batch["input_ids"].shape[1] > longest_shared(self.model):
            return self.forward_plain(batch)
        output = forward_shared(self.model, batch, self._image_token_id)
        self.num_tokens += output.num_tokens
        return output

    def forward_plain(self, batch: dict[str, Any]) -> SharedOutput:
        """The completions of a collated batch, every row by itself."""
        output = forward_plain(self.model, self.on_device(batch))
        self.num_tokens += output.num_tokens
        return output

    def on_device(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch's tensors where the model is."""
        return {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _batches(
        self, rows: Sequence[Row], batch_size: int, collator: CompletionCollator | None
    ) -> Iterator[list[list[int]]]:
        """Row numbers by batch, rows with pictures apart from those without."""
        all_rows = outlines(rows, with_prefixes=self.share_prefixes and collator is not None)
        for pictured in (True, False):
            members = [row for row in all_rows if row.pictured == pictured]
            if self.share_prefixes and collator is not None and self._can_share(rows, members, collator):
                yield batches_by_prefix(members, batch_size)
            else:
                yield batches_by_length(members, batch_size)

    def _can_share(self, rows: Sequence[Row], members: list[Outline], collator: CompletionCollator) -> bool:
        """Whether rows of a kind may share what they begin with, tried by all processes on the same rows of the kind.

        Two rows at least are needed to tell.
        """
        if len(members) < 2:
            return False
        pictured = members[0].pictured
        if pictured not in self.why_apart:
            why = cannot_share(self.model)
            if why is None:
                few = [batch for batch in batches_by_prefix(members, COMPARED_ROWS) if len(batch) > 1]
                batch = self._collate(collator, [rows[i] for i in few[-1]])
                if batch["input_ids"].shape[1] > longest_shared(self.model):
                    return False
                why = compare_with_plain(self.model, batch, self._image_token_id)
            why = next((each for each in gather_object([why]) if each is not None), None)
            if why is not None:
                kind = "with" if pictured else "without"
                logger.info("Rows %s pictures share no prefixes with %s: %s.", kind, type(self.model).__name__, why)
            self.why_apart[pictured] = why
        return self.why_apart[pictured] is None

    @staticmethod
    def _collate(collator: CompletionCollator, rows: Sequence[Row]) -> dict[str, Any]:
        return {**collator(rows), "num_images": torch.tensor([len(row.get("images") or []) for row in rows])}
