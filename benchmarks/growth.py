"""How time and memory grow with the training set: its reference is computed, then an epoch is drawn and collated.

python benchmarks/growth.py --rows 1000 10000 100000
python benchmarks/growth.py --rows 500 --json           # one size, in this process

What a step costs does not depend on the set; what is done once a row might. Each size has a process of its own, whose
peak of resident memory is told beside what it was before the set was opened. NPO + retain, the sets memory-mapped.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

ROWS, TOKENS, BATCH = (1_000, 10_000, 100_000), 40, 64


@dataclass(frozen=True)
class Outcome:
    """A line of the table.

    Attributes:
        rows: of the forget set, and as many of the retain set.
        reference: processor seconds of the reference, a forward pass of every forget row.
        epoch: processor seconds until every row has been drawn and collated.
        before: resident memory before the set was opened, in MiB.
        peak: the most of it until the end, in MiB.
    """

    rows: int
    reference: float
    epoch: float
    before: float
    peak: float

    @property
    def per_row(self) -> float:
        """Microseconds."""
        return 1e6 * (self.reference + self.epoch) / self.rows

    def __str__(self) -> str:
        seconds = f"{self.reference:.1f} | {self.epoch:.1f} | {self.per_row:.0f}"
        return f"| {self.rows:,} | {seconds} | {self.before:,.0f} | {self.peak:,.0f} |"


def measure(number: int) -> Outcome:
    """Takes one set through it, in this process."""
    import biasunlearn_trainer  # noqa: F401  before transformers: mends torchvision beside a torch for the CPU

    # isort: split
    import torch
    from datasets import Dataset
    from shapes import TEXT_SHAPES, make_llama

    from biasunlearn_trainer import NPOConfig, NPOTrainer

    def rows(stream: str) -> Iterator[dict[str, str]]:
        for i in range(number):
            yield {"prompt": f"{stream} {i}: who?".ljust(TOKENS - 8), "completion": f" {i}".ljust(7, ".")}

    torch.set_num_threads(1)
    model, tokenizer = make_llama(TEXT_SHAPES["tiny"], "cpu", torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        args = NPOConfig(
            folder, per_device_train_batch_size=BATCH, per_device_eval_batch_size=BATCH, reference="precomputed",
            reference_cache_dir=f"{folder}/references", report_to=[], use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        sets = {
            f"{stream}_dataset": Dataset.from_generator(rows, gen_kwargs={"stream": stream}, cache_dir=folder)
            for stream in ("forget", "retain")
        }
        before = _resident()
        trainer = NPOTrainer(model, args, processing_class=tokenizer, **sets)
        start = time.process_time()
        trainer.prepare_reference()
        middle = time.process_time()
        seen = sum(len(batch["forget"]["index"]) for batch in trainer.get_train_dataloader())
        assert seen == number, f"an epoch has {seen} of {number} rows"
        return Outcome(number, middle - start, time.process_time() - middle, before, _resident())


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def outcomes(sizes: Sequence[int]) -> Iterator[Outcome]:
    """Each size in a process of its own."""
    for number in sizes:
        line = [sys.executable, __file__, "--rows", str(number), "--json"]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{number} rows: exit status {done.returncode}\n{done.stderr[-2000:]}")
        yield Outcome(**json.loads(done.stdout.splitlines()[-1]))


def header() -> str:
    """The first lines of the table."""
    return f"| rows | reference s | epoch s | µs a row | MiB before | peak MiB |\n{'|---' * 6}|"


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--json", action="store_true", help="the first size alone, in this process, as JSON")
    arguments = parser.parse_args()
    if arguments.json:
        print(json.dumps(asdict(measure(arguments.rows[0]))))
        return 0
    print(header(), flush=True)
    for outcome in outcomes(arguments.rows):
        print(outcome, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
