"""What training, evaluation and the Fisher cost beside every alternative, and which of the bounds they meet.

python benchmarks/run.py                                                # all but evaluation on a CPU, an hour or more
python benchmarks/run.py --data DATA --models random --limit 400        # evaluation too
python benchmarks/run.py --shapes tiny --parts training --rounds 3      # a minute
python benchmarks/run.py --shapes long --methods ga_diff "NPO + retain, precomputed"
python benchmarks/run.py --device cuda                                  # LLaVA-1.5-7B shape, bf16, LoRA
python benchmarks/run.py --shapes 7b --size tiny                        # the same code without a GPU

A step is forward and backward passes of a trainer on a collated batch, without the optimizer. It is compared with
fine-tuning on the same tokens, all rows in one batch: plain (`transformers.Trainer`, logits of all positions) and floor
(the head on completion positions alone); with TRL's `DPOTrainer` where a step of it is comparable; and with the naive
way of naive.py. All take turns, the floor right beside each form, the others in every third round; ratios are medians
over rounds of the ratio within a round, with quartiles. Time is the process's own on one thread of a CPU, on a GPU wall
time with its queue emptied. Memory is the peak of bytes of tensors; `over weights` leaves out the policy's, and counts
a second model's. The exit status is 1 where a bound that was measured is not met.
"""

from __future__ import annotations

import argparse
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import biasunlearn_trainer  # noqa: F401  before transformers: mends torchvision beside a torch for the CPU

# isort: split
import evaluation
import fisher
import peft
import scaling
import torch
import transformers
import trl
from bounds import Bound, bounds_table, evaluation_bounds, fisher_bounds, growth_bounds, training_bounds
from shapes import SHAPES
from training import measure, memory_table, time_table
from workloads import FORMS, WORKLOADS

from biasunlearn_trainer.saliency.distribution import markdown_table
from biasunlearn_trainer.trainers.registry import METHODS
from biasunlearn_trainer.version import __version__

PARTS = ("training", "memory", "evaluation", "fisher", "growth")
H200_BF16 = 989.0
SIZES = (10_000, 100_000)  # below, fixed costs stand out


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--shapes", nargs="+", choices=WORKLOADS, help="text, llava and 50m; on a GPU 7b")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *FORMS], metavar="METHOD", help="or their forms")
    parser.add_argument("--rounds", type=int, default=9, help="counted steps; a third for slow rivals")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SHAPES, default="7b", help="of the model of shape 7b")
    parser.add_argument("--batch", type=int, help="rows of each stream, where it is not the shape's own")
    parser.add_argument("--peak_tflops", type=float, help=f"of the card; {H200_BF16:g} (H200, bf16) on a GPU")
    parser.add_argument("--data", type=Path, help="for evaluation: the folder of the published sets")
    parser.add_argument("--models", nargs="+", default=["random"], help="for evaluation")
    parser.add_argument("--tasks", nargs="+", default=list(evaluation.TASKS), help="for evaluation")
    parser.add_argument("--limit", type=int, help="for evaluation: items of each set")
    parser.add_argument("--batch_size", type=int, default=64, help="for evaluation")
    parser.add_argument("--cases", nargs="+", choices=fisher.CASES, default=list(fisher.CASES), help="for fisher")
    parser.add_argument("--output", type=Path, help="write what is printed to this file too")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --shapes 7b --size tiny runs the same code")
    arguments.shapes = arguments.shapes or (["7b"] if on_gpu else ["text", "llava", "50m"])
    arguments.peak_tflops = arguments.peak_tflops or (H200_BF16 if on_gpu else None)
    arguments.dtype = "bfloat16" if on_gpu else "float32"
    return arguments


def machine(arguments: argparse.Namespace) -> str:
    """Where, when and with what."""
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else f"one thread of {cpu()}"
    versions = [f"{part.__name__} {part.__version__}" for part in (torch, transformers, peft, trl)]
    command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    words = [name, *versions, f"biasunlearn_trainer {__version__}", time.strftime("%Y-%m-%d")]
    return f"{', '.join(words)}\n\n    {command}"


def cpu() -> str:
    """The processor's name and number of cores."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({torch.get_num_threads()} of {len(names)} cores)"


def sections(arguments: argparse.Namespace) -> Iterator[str | list[Bound]]:
    """Tables as they are ready, and the bounds that they decide."""
    found = {}
    if {"training", "memory"} & set(arguments.parts):
        for name in arguments.shapes:
            workload = WORKLOADS[name]
            workload = replace(workload, shape=SHAPES[arguments.size]) if name == "7b" else workload
            workload = replace(workload, rows=arguments.batch or workload.rows)
            with tempfile.TemporaryDirectory() as folder:
                found[name] = measure(workload, folder, arguments)
            yield f"## {name}: {workload.words()}"
            if "training" in arguments.parts:
                yield time_table(found[name])
            if "memory" in arguments.parts:
                yield memory_table(found[name])
        yield training_bounds(found)
    if "evaluation" in arguments.parts:
        yield "## Evaluation against one sentence per forward pass"
        scored = list(evaluation.outcomes(arguments)) if arguments.data else []
        yield "\n".join(map(str, [evaluation.header(), *scored])) if scored else "Not measured: no --data was given."
        yield evaluation_bounds(scored)
    if "fisher" in arguments.parts:
        yield "## The per-sample Fisher against the per-batch one"
        measured = list(fisher.outcomes(arguments))
        yield "\n".join(map(str, [fisher.header(), *measured]))
        yield fisher_bounds(measured)
    if "growth" in arguments.parts:
        yield f"## Sets of {' to '.join(f'{size:,}' for size in SIZES)} rows"
        with tempfile.TemporaryDirectory() as folder:
            grown = {
                stage: scaling.growth(SIZES, scaling.medians(stage, Path(folder), SIZES, rounds=1))
                for stage in scaling.STAGES
            }
        lines = [[stage, f"{times:.2f}", f"{size:.0f}"] for stage, (times, size) in grown.items()]
        yield markdown_table(["stage", "time a row, last to first", "bytes a row"], lines)
        yield growth_bounds(grown)


def main() -> int:
    """Prints tables and bounds; 1 where one is missed."""
    arguments = parse()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    written, bounds = [], []

    def say(text: str) -> None:
        written.append(text)
        print(text, end="\n\n", flush=True)

    say(machine(arguments))
    for section in sections(arguments):
        if isinstance(section, str):
            say(section)
        else:
            bounds += section
    say("## Bounds")
    say(bounds_table(bounds))
    if arguments.output:
        arguments.output.write_text("\n\n".join(written) + "\n", encoding="utf-8")
    return int(any(bound.met is False for bound in bounds))


if __name__ == "__main__":
    sys.exit(main())
