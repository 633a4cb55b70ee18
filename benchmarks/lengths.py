"""How much of what training forwards is padding, with rows shuffled and with batches by length, and what it costs.

    python -m biasunlearn_trainer.data_builders.build recipes/data/bbq.yaml           # and stereoset.yaml
    python benchmarks/lengths.py --tokenizer MODEL --sets data/bbq data/stereoset

Padding is counted over `--epochs` of GA_Diff, for streams forwarded one by one and, `together`, with one padded
width for both. The time is that of forward and backward passes of `--steps` steps of a 6.6 M-parameter Llama with
random weights, processor time of one thread, the two ways in turn; the steps are spread evenly over an epoch.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import biasunlearn_trainer  # noqa: F401  first: it mends torchvision beside a torch for the CPU

# isort: split
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from biasunlearn_trainer import GADiffConfig, GADiffTrainer
from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.models import load_processor

STRATEGIES = ("random", "group_by_length")


def trainer_of(folder: Path, tokenizer: str, strategy: str, batch: int, steps: int) -> GADiffTrainer:
    """GA_Diff on a built set."""
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 8}
    processing_class = load_processor(tokenizer)
    torch.manual_seed(0)
    return GADiffTrainer(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=len(processing_class), **shape)),
        args=GADiffConfig(
            tempfile.mkdtemp(),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=steps,
            report_to=[],
            use_cpu=True,
            train_sampling_strategy=strategy,
        ),
        forget_dataset=load_rows(str(folder / "data" / "forget.parquet")),
        retain_dataset=load_rows(str(folder / "data" / "retain.parquet")),
        processing_class=processing_class,
    )


def padding(trainer: GADiffTrainer, epochs: int) -> tuple[float, float]:
    """Share of forwarded tokens that are padding: streams one by one, and both to one width."""
    streams, batch = trainer.train_dataset, trainer.args.per_device_train_batch_size
    tokens = {name: _tokens(trainer, stream.rows) for name, stream in streams.streams.items()}
    real = apart = together = 0
    for epoch in range(epochs):
        for start in range(0, len(streams), batch):
            drawn = [streams.indices(epoch * len(streams) + d) for d in range(start, min(start + batch, len(streams)))]
            widths = [tokens[name][[i for draw in drawn for i in draw[name]]] for name in tokens]
            real += sum(map(np.sum, widths))
            apart += sum(len(width) * width.max() for width in widths)
            together += sum(map(len, widths)) * max(width.max() for width in widths)
    return 1 - real / apart, 1 - real / together


def _tokens(trainer: GADiffTrainer, rows: object) -> np.ndarray:
    tokenizer = trainer.collator.tokenizer
    eos = 1  # appended to every completion
    return np.array([len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + eos for row in rows])


def seconds(trainers: dict[str, GADiffTrainer], steps: int) -> dict[str, float]:
    """Processor seconds of forward and backward passes a step, each way in turn."""
    spent = dict.fromkeys(trainers, 0.0)
    for step in range(-1, steps):
        for name, trainer in trainers.items():
            streams, batch = trainer.train_dataset, trainer.args.per_device_train_batch_size
            whole = len(streams) // batch
            first = (max(step, 0) * whole // steps + 1) % whole * batch
            inputs = trainer.data_collator([streams[first + d] for d in range(batch)])
            start = time.process_time()
            trainer.compute_loss(trainer.model, inputs).backward()
            spent[name] += (time.process_time() - start) * (step >= 0)  # the first is not counted
            trainer.model.zero_grad()
    return {name: value / steps for name, value in spent.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="+", type=Path, required=True, help="folders of built sets")
    parser.add_argument("--tokenizer", required=True, help="name or path of a model's tokenizer")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| set | rows | order | padding | padding together | s a step | against random |")
    print("|---|---|---|---|---|---|---|")
    for folder in args.sets:
        trainers = {s: trainer_of(folder, args.tokenizer, s, args.batch, args.accumulation) for s in STRATEGIES}
        times = seconds(trainers, args.steps)
        for name, trainer in trainers.items():
            shares = " | ".join(f"{share:.1%}" for share in padding(trainer, args.epochs))
            cost = f"{times[name]:.3f} | {times[name] / times['random']:.2f}"
            print(f"| {folder.name} | {len(trainer.train_dataset)} | {name} | {shares} | {cost} |")


if __name__ == "__main__":
    main()
