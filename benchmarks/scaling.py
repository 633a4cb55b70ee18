"""What a run costs as its sets grow: processor time and memory of each stage for sets of several sizes.

    python benchmarks/scaling.py --sizes 1000 10000 100000

Every stage of every size runs in a process of its own, on memory-mapped text rows, with a Llama of 0.1 M parameters.
Memory is the process' own at its highest during the stage (resident and not backed by a file, so that pages of
mapped sets do not count) beyond what it had before.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import biasunlearn_trainer  # noqa: F401  first: it mends torchvision beside a torch for the CPU

# isort: split
import torch
from datasets import Dataset, load_from_disk
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.fingerprints import content_fingerprint, rows_fingerprint
from biasunlearn_trainer.streams import PairedStreams, modality_batches
from biasunlearn_trainer.trainers.registry import get_method
from biasunlearn_trainer.trainers.steering import BiasReading

TYPES = ("gender", "profession", "race", "religion")
STEPS = 50
# A stage runs so often that its largest size takes this long in all, at most this many times as often as asked for.
ENOUGH_SECONDS, MOST_ROUNDS = 10.0, 5
BATCH = 8


def texts(number: int, name: str) -> Iterator[dict[str, Any]]:
    """Short rows of different lengths."""
    for i in range(number):
        yield {
            "prompt": f"{name} {i:06d}: " + "who was late" * (1 + i * 7 % 4),
            "completion": " nobody"[: 3 + i % 5],
            "pair_id": str(i),
            "bias_type": TYPES[i % len(TYPES)],
        }


def sets(folder: Path, number: int) -> dict[str, Dataset]:
    """Forget, retain and utility rows, as many of each, memory-mapped."""
    found = {}
    for name in ("forget", "retain", "utility"):
        place = folder / f"{name}-{number}"
        if not place.is_dir():
            rows = Dataset.from_generator(
                texts, gen_kwargs={"number": number, "name": name}, cache_dir=str(folder / "cache")
            )
            rows.save_to_disk(place)
        found[name] = load_from_disk(place)
    return found


def trainer(method: str, folder: Path, number: int, given: Sequence[str], **settings: Any) -> Any:
    """A trainer of a method on sets of this size."""
    from shapes import make_tokenizer

    trainer_class, config_class = get_method(method)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    args = config_class(
        str(folder / "out"),
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=32,
        max_steps=STEPS,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        reference="precomputed",
        reference_cache_dir=tempfile.mkdtemp(dir=folder),
        **{key: value for key, value in settings.items() if key != "bias_probe"},
    )
    return trainer_class(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=320, **shape)),
        args=args,
        processing_class=make_tokenizer(320),
        **{f"{name}_dataset": rows for name, rows in sets(folder, number).items() if name in given},
        **{key: value for key, value in settings.items() if key == "bias_probe"},
    )


def npo(folder: Path, number: int) -> Any:
    """NPO + retain, batches by length."""
    return trainer("npo", folder, number, ("forget", "retain"), train_sampling_strategy="group_by_length")


def biasunlearn(folder: Path, number: int) -> Any:
    """BiasUnlearn with everything on: pairs by their ids, the adversarial share, both sides."""
    probe = {bias_type: BiasReading(50.0, 50.0, number) for bias_type in TYPES}
    given = ("forget", "retain", "utility")
    return trainer("biasunlearn", folder, number, given, bias_probe=lambda model: probe)


def epoch(streams: PairedStreams) -> None:
    """The rows of an epoch's draws."""
    for draw in range(len(streams)):
        streams.indices(draw)


def two_modalities(folder: Path, number: int) -> PairedStreams:
    """Streams of which every second row has a picture."""
    rows = [{"images": ["a.png"] * (i % 2), "prompt": "", "completion": ""} for i in range(number)]
    return PairedStreams({"forget": rows, "retain": rows}, 0, BATCH)


def collate_all(rows: Dataset) -> None:
    """What a run does to find rows that do not become tensors."""
    from shapes import make_tokenizer

    collator = CompletionCollator(make_tokenizer(320))
    for numbers in modality_batches(rows, 32):
        collator([rows[i] for i in numbers])


# Name -> what is made beforehand, and what is measured of it.
STAGES: dict[str, tuple[Callable, Callable]] = {
    "fingerprint of a set": (lambda *at: sets(*at)["forget"], rows_fingerprint),
    "fingerprint of a task's rows": (lambda folder, number: list(texts(number, "task")), content_fingerprint),
    "collation of every row": (lambda *at: sets(*at)["forget"], collate_all),
    "trainer, NPO by length": (lambda *at: at, lambda at: npo(*at)),
    "trainer, BiasUnlearn": (lambda *at: at, lambda at: biasunlearn(*at)),
    "draws of an epoch, by length": (lambda *at: npo(*at).train_dataset, epoch),
    "draws of an epoch, half with pictures": (two_modalities, epoch),
    "reference, a number a row": (npo, lambda trainer: trainer.prepare_reference()),
    "reference, hidden states": (
        lambda *at: trainer("kl_min", *at, ("forget", "retain"), reference_dtype="bfloat16"),
        lambda trainer: trainer.prepare_reference(),
    ),
    f"{STEPS} steps, by length": (
        lambda *at: trainer("ga_diff", *at, ("forget", "retain"), train_sampling_strategy="group_by_length"),
        lambda trainer: trainer.train(),
    ),
}


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


class Peak:
    """The most memory of its own that the process had at a time inside the block, beyond what it had before."""

    def __enter__(self):
        self._done, self._before, self.bytes = threading.Event(), own_memory(), 0
        self._watcher = threading.Thread(target=self._watch)
        self._watcher.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, own_memory() - self._before)

    def __exit__(self, *error: Any) -> None:
        self._done.set()
        self._watcher.join()
        self._look()


def _measure(stage: str, folder: Path, number: int, answer: Any) -> None:
    torch.set_num_threads(1)
    before, run = STAGES[stage]
    sets(folder, number)  # written by the first stage, and part of none
    made = before(folder, number)
    with Peak() as peak:
        start = time.process_time()
        run(made)
        seconds = time.process_time() - start
    answer.send((seconds, peak.bytes))


def measure(stage: str, folder: Path, number: int) -> tuple[float, int]:
    """Processor seconds and peak bytes of a stage, in a process of its own."""
    context = multiprocessing.get_context("fork")
    answer, sent = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(stage, folder, number, sent))
    process.start()
    sent.close()
    try:
        return answer.recv()
    except EOFError:
        raise RuntimeError(f"{stage!r} failed for {number:,} rows; its error stands above.") from None
    finally:
        process.join()


def medians(stage: str, folder: Path, sizes: Sequence[int], rounds: int) -> dict[int, tuple[float, int]]:
    """By size the seconds and bytes of a stage, medians of several rounds that go through the sizes in turn.

    What takes a fraction of a second varies by a third from one run to the next, and takes part in more rounds.
    """
    found: list[dict[int, tuple[float, int]]] = []
    while len(found) < rounds or (
        len(found) < MOST_ROUNDS * rounds and sum(each[sizes[-1]][0] for each in found) < ENOUGH_SECONDS
    ):
        found.append({size: measure(stage, folder, size) for size in sizes})
    return {size: tuple(map(median, zip(*(each[size] for each in found), strict=True))) for size in sizes}


def growth(sizes: Sequence[int], found: Mapping[int, tuple[float, int]]) -> tuple[float, float]:
    """From the size before last to the last: the ratio of seconds a row, and bytes that each further row takes."""
    (small, large), (before, after) = sizes[-2:], (found[size] for size in sizes[-2:])
    return after[0] / before[0] * small / large, (after[1] - before[1]) / (large - small)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=3, help="how often a stage runs at least; medians count")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--folder", type=Path, help="where sets and references are written; a temporary one by default")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    disable_progress_bar()
    sizes = " | ".join(f"{size:,} rows" for size in args.sizes)
    print(f"| stage | {sizes} | time a row, last to one before | bytes a row |")
    print("|---" * (len(args.sizes) + 3) + "|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for stage in args.stages:
            found = medians(stage, folder, args.sizes, args.rounds)
            cells = [f"{seconds:.2f} s, {peak / 2**20:.1f} MiB" for seconds, peak in found.values()]
            ratio, per_row = growth(args.sizes, found)
            print(f"| {stage} | " + " | ".join(cells) + f" | {ratio:.2f} | {per_row:.0f} |", flush=True)


if __name__ == "__main__":
    main()
