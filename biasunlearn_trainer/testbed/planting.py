"""Training a tiny model on a pool of rows, with the bias in it or without, and measuring what it learned.

The pool is turned into tensors once; a step only gathers rows of them, so that nearly all time goes into the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import CompletionOutput, forward_completions

_CHUNK = 512
_MAX_GRAD_NORM = 1.0


@dataclass
class RowTable:
    """N rows of one modality as tensors.

    Attributes:
        columns: what `CompletionCollator` gives for all rows at once; the first dimension is N. What it gives by image
            patch (Qwen2-VL's `pixel_values`) is (N, patches of a row, ...) here: all rows must have equally many.
        lengths: (N,) tokens of each row, padding not counted.
        by_patch: columns that the model takes patch after patch.
    """

    columns: dict[str, Tensor]
    lengths: Tensor
    by_patch: frozenset[str] = frozenset()

    def __len__(self) -> int:
        return len(self.lengths)

    def rows(self, index: Tensor) -> RowTable:
        """The table of the rows `index` (B,)."""
        columns = {name: values[index] for name, values in self.columns.items()}
        return RowTable(columns, self.lengths[index], self.by_patch)

    def take(self, index: Tensor) -> dict[str, Tensor]:
        """The batch of the rows `index` (B,), cut to its longest row."""
        width = int(self.lengths[index].max())
        shape = self.columns["input_ids"].shape
        batch = {
            name: values[index][:, :width] if values.shape == shape else values[index]
            for name, values in self.columns.items()
        }
        return batch | {name: batch[name].flatten(0, 1) for name in self.by_patch}


def make_table(collator: CompletionCollator, rows: Sequence[dict[str, Any]]) -> RowTable:
    """Collate rows of one modality, a chunk at a time, into one table."""
    chunks = [collator(rows[start : start + _CHUNK]) for start in range(0, len(rows), _CHUNK)]
    width = max(chunk["input_ids"].shape[1] for chunk in chunks)
    by_patch = frozenset(name for name, values in chunks[0].items() if len(values) > len(chunks[0]["input_ids"]))
    for chunk in chunks:
        shape = chunk["input_ids"].shape
        for name, values in chunk.items():
            if values.shape == shape:
                filler = collator.tokenizer.pad_token_id if name == "input_ids" else 0
                chunk[name] = _pad(values, width, filler)
            elif name in by_patch:
                chunk[name] = values.unflatten(0, (shape[0], -1))
    columns = {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}
    return RowTable(columns, columns["attention_mask"].sum(1), by_patch)


def _pad(values: Tensor, width: int, value: float) -> Tensor:
    return torch.nn.functional.pad(values, (0, width - values.shape[1]), value=value)


def shuffled(rows: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches (B,) of row numbers without end: every one of `rows` (N,) once, then all again in a new order."""
    order = rows[:0]
    while True:
        while len(order) < batch_size:
            order = torch.cat([order, rows[torch.randperm(len(rows), generator=generator)]])
        yield order[:batch_size]
        order = order[batch_size:]


@dataclass
class Job:
    """A model to train and what it learns.

    Attributes:
        label: what the progress bar says.
        model: trained in place; left in eval mode.
        sources: a table, the numbers of its rows to learn, and how many of them a step takes. The loss is the mean over
            all completion tokens of a step.
    """

    label: str
    model: PreTrainedModel
    sources: Sequence[tuple[RowTable, Tensor, int]]


def train_side_by_side(
    jobs: Sequence[Job], *, steps: int, learning_rate: float, seed: int, label_smoothing: float = 0.0
) -> None:
    """Train models at the same time, each on one core.

    Matrices this small gain little from a second core, and where neighbours are busy two threads of one model wait for
    each other; a core for each model takes nearly half the time. Nor do weights then depend on the number of cores.

    Args:
        jobs: the models; each is trained as if it were alone.
        steps: optimizer steps; 0 trains nothing.
        learning_rate: peak of the schedule.
        seed: decides the order of rows, alike for all jobs.
        label_smoothing: as in `train`.
    """
    num_threads = torch.get_num_threads()

    def run(position: int) -> None:
        torch.set_num_threads(1)
        options = {"steps": steps, "learning_rate": learning_rate, "seed": seed, "label_smoothing": label_smoothing}
        train(jobs[position], position=position, **options)

    try:
        with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
            list(pool.map(run, range(len(jobs))))
    finally:
        torch.set_num_threads(num_threads)


def train(
    job: Job, *, steps: int, learning_rate: float, seed: int, position: int = 0, label_smoothing: float = 0.0
) -> None:
    """Train one model on completions: AdamW, one-cycle schedule, one forward pass a source and step.

    Args:
        job: the model and what it learns.
        steps: optimizer steps; 0 trains nothing.
        learning_rate: peak of the schedule.
        seed: decides the order of rows.
        position: line of the progress bar.
        label_smoothing: share of each target that is spread evenly over all tokens, 0 to 1: how unsure the model stays.
    """
    model = job.model
    if steps == 0:
        model.eval()
        return
    generator = torch.Generator().manual_seed(seed)
    draws = [(table, shuffled(rows, size, generator)) for table, rows, size in job.sources if len(rows) and size]
    # The second beta is low because a run is short: gradients of the first hundred steps say little about later ones.
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    # The schedule divides by its number of warm-up steps less one, so a handful of steps are not enough for it.
    total = max(steps, 20)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=total, pct_start=0.15)
    model.train()
    progress = tqdm(range(steps), desc=job.label, unit="step", position=position, mininterval=1.0)
    for step in progress:
        outputs = [forward_completions(model, table.take(next(order))) for table, order in draws]
        loss = sum(_summed_loss(out, label_smoothing) for out in outputs) / sum(len(out.targets) for out in outputs)
        loss.backward()
        clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    model.eval()


def _summed_loss(out: CompletionOutput, label_smoothing: float) -> Tensor:
    """The negative log-likelihood of all completion tokens, against smoothed targets where asked for."""
    if not label_smoothing:
        return -out.logps.sum()
    return cross_entropy(out.logits, out.targets, label_smoothing=label_smoothing, reduction="sum")


@torch.no_grad()
def measure_right(model: PreTrainedModel, table: RowTable) -> Tensor:
    """(N,) bool: whether the greedy answer to each row is its completion, EOS included."""
    was_training = model.training
    model.eval()
    right = []
    for index in torch.arange(len(table)).split(_CHUNK):
        out = forward_completions(model, table.take(index))
        wrong = out.scatter((out.logits.argmax(-1) != out.targets).float()).sum(-1)
        right.append(wrong == 0)
    model.train(was_training)
    return torch.cat(right)
