"""Measure a model from the command line.

    python -m biasunlearn_trainer.eval.run --model MODEL --tasks stereoset planted=DIR --data PATH --output results.json

Writes the result, the records of all items beside it (`results.items.jsonl`), and prints a table. The records of the
model before unlearning, given as `--baseline`, add the metrics that compare with it (localities). Under `accelerate
launch` the items are shared out over the processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate import PartialState
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.eval.schema import EvalResult, save_results, write_text
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks import TASKS, Task, load_tasks
from biasunlearn_trainer.eval.tasks.base import Item
from biasunlearn_trainer.models import load_model, load_processor

logger = logging.getLogger(__name__)


def evaluate(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    tasks: Mapping[str, Task],
    *,
    name: str,
    batch_size: int = 64,
    baseline: Mapping[str, Sequence[Item]] | None = None,
    answers: bool = False,
    share_prefixes: bool = True,
) -> tuple[EvalResult, dict[str, list[Item]]]:
    """Measure a model on tasks.

    Args:
        model: on the device where it is to run.
        processing_class: its tokenizer or processor.
        tasks: by key, as `load_tasks` gives them.
        name: what the result calls the model.
        batch_size: rows of one forward pass.
        baseline: records of the model before unlearning, by task.
        answers: also generate answers that the scores do not tell.
        share_prefixes: compute once what rows of a batch begin with.

    Returns:
        The result, and the records of every task.
    """
    scorer = Scorer(model, processing_class, batch_size=batch_size, share_prefixes=share_prefixes)
    items = {key: task.run(scorer, answers=answers) for key, task in tasks.items()}
    before = baseline or {}
    results = {key: task.summarise(items[key], before.get(key)) for key, task in tasks.items()}
    return EvalResult(model=name, tasks=results), items


def save_items(items: Mapping[str, Sequence[Item]], path: str | Path) -> None:
    """Write records as JSON Lines, each with its `task`; the file appears whole or not at all."""
    lines = [json.dumps({"task": task, **item}, ensure_ascii=False) for task, part in items.items() for item in part]
    write_text(path, "".join(line + "\n" for line in lines))


def load_items(path: str | Path) -> dict[str, list[Item]]:
    """Read what `save_items` wrote, by task.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: naming the line that is no record.
    """
    items: dict[str, list[Item]] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            item = json.loads(line)
            items.setdefault(item.pop("task"), []).append(item)
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            raise ValueError(f"{path}, line {number} is no record of an evaluation: {line!r:.80}") from err
    return items


def items_path(output: str | Path) -> Path:
    """Where the records of a result go: `results.json` -> `results.items.jsonl`."""
    return Path(output).with_suffix(".items.jsonl")


def format_table(result: EvalResult) -> str:
    """The result as lines of text: task, group, metric, value, 95 % interval, n."""
    rows = [("task", "group", "metric", "value", "95 % interval", "n")]
    for key, task in result.tasks.items():
        for group, metrics in {"": task.metrics, **task.groups}.items():
            for name, m in metrics.items():
                digits = 1 if (m.ideal or 0) > 1 else 3
                low, high = (f"{end:.{digits}f}" for end in m.ci95)
                rows.append((key, group, name, f"{m.value:.{digits}f}", f"[{low}, {high}]", str(m.n)))
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join(
        "  ".join(cell.rjust(width) if column > 2 else cell.ljust(width) for column, (cell, width) in enumerate(line))
        for line in (list(zip(row, widths, strict=True)) for row in rows)
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(prog="python -m biasunlearn_trainer.eval.run", description="Measure a model.")
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, or folder of an adapter")
    parser.add_argument(
        "--tasks", required=True, nargs="+", metavar="NAME[@LABEL][=PATH]", help=f"among: {', '.join(TASKS)}"
    )
    parser.add_argument("--data", help="data of the tasks that name no PATH, or a folder with one of the task's name")
    parser.add_argument("--output", required=True, help="results file, .json")
    parser.add_argument("--baseline", help="items.jsonl of the model before unlearning, for localities")
    parser.add_argument("--batch_size", type=int, default=64, help="rows of one forward pass (64)")
    parser.add_argument(
        "--share_prefixes",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compute once what rows of a batch begin with (same scores, on by default)",
    )
    parser.add_argument("--limit", type=int, help="measure at most this many items a task, for a quick look")
    parser.add_argument("--dtype", help="precision of the weights, for instance bfloat16; by default the checkpoint's")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def run(args: argparse.Namespace) -> EvalResult:
    """Do what the command line asks for; data are read first, so that a wrong path costs no model loading.

    Raises:
        ValueError: for unknown tasks, faulty data, or options out of range.
        OSError: where the model or the baseline is not there.
    """
    if Path(args.output).suffix != ".json":
        raise ValueError(f"--output must be a .json file, got {args.output!r}.")
    if args.batch_size < 1:
        raise ValueError(f"--batch_size must be at least 1, got {args.batch_size}.")
    tasks = load_tasks(args.tasks, args.data, args.limit)
    baseline = load_items(args.baseline) if args.baseline else None
    if baseline is not None and not set(tasks) & set(baseline):
        raise ValueError(f"{args.baseline} holds no records of {', '.join(tasks)}; it has: {', '.join(baseline)}.")
    model = load_model(
        args.model, dtype=args.dtype, revision=args.revision, trust_remote_code=args.trust_remote_code
    ).to(PartialState().device)
    processing_class = load_processor(args.model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    result, items = evaluate(
        model,
        processing_class,
        tasks,
        name=str(args.model),
        batch_size=args.batch_size,
        baseline=baseline,
        answers=True,
        share_prefixes=args.share_prefixes,
    )
    if PartialState().is_main_process:
        save_items(items, items_path(args.output))
        save_results(result, args.output)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 with the reason on standard error."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        result = run(args)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print(format_table(result))
        print(f"written: {args.output}, {items_path(args.output)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
