"""TOFU's forget quality from the records of two models.

    python -m biasunlearn_trainer.eval.forget_quality UNLEARNED RETAINED [--task tofu] [--output quality.json]

UNLEARNED and RETAINED are the `*.items.jsonl` that evaluations of the task `tofu` wrote, RETAINED of a model that was
trained on the retain set alone; or `eval_log_aggregated.json` files of the authors' code (also gzipped). Truth ratios
are made with the geometric mean, as in that code.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from biasunlearn_trainer.eval.metrics import forget_quality, truth_ratio
from biasunlearn_trainer.eval.run import format_table, load_items
from biasunlearn_trainer.eval.schema import EvalResult, TaskResult, save_results
from biasunlearn_trainer.eval.tasks.clear import truth_ratios

PUBLISHED = "eval_log_forget.json"


def read_ratios(path: str | Path, task: str = "tofu") -> np.ndarray:
    """The truth ratios on the forget set, from records or a published log.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no truth ratios of the task on a forget set.
    """
    path = Path(path).expanduser()
    if path.name.endswith((".json", ".json.gz")):
        return _published_ratios(path)
    records = load_items(path)
    if task not in records:
        raise ValueError(f"{path} has no records of {task!r}; it has: {', '.join(records)}. Name one by --task.")
    scored = [r for r in records[task] if r.get("way") == "likelihood" and str(r.get("set")).startswith("forget")]
    scored = [record for record in scored if record["mean_logps_wrong"]]
    if not scored:
        raise ValueError(
            f"{path}: {task!r} has no items of a forget set with wrong answers. Measure tofu=ROOT/forget10."
        )
    return truth_ratios(scored, mean="geometric")


def _published_ratios(path: Path) -> np.ndarray:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        log = json.load(file)
    try:
        part = log[PUBLISHED]
        right, wrong = (np.array(list(part[key].values())) for key in ("avg_paraphrased_loss", "average_perturb_loss"))
    except (KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"{path} is no eval_log_aggregated.json of TOFU's code: no {err} in it.") from err
    return truth_ratio(-right, -wrong, mean="geometric")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 with the reason on standard error."""
    parser = argparse.ArgumentParser(prog="python -m biasunlearn_trainer.eval.forget_quality", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("unlearned", help="records or log of the unlearned model")
    parser.add_argument("retained", help="records or log of a model trained on the retain set alone")
    parser.add_argument("--task", default="tofu", help="key of the task in the records (tofu)")
    parser.add_argument("--output", help="results file, .json")
    args = parser.parse_args(argv)
    try:
        ratios = [read_ratios(path, args.task) for path in (args.unlearned, args.retained)]
        result = EvalResult(model=str(args.unlearned), tasks={args.task: TaskResult(forget_quality(*ratios))})
        if args.output:
            save_results(result, args.output)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    print(format_table(result))
    # A table of three digits cannot show what p values are about.
    print(f"p = {result.tasks[args.task].metrics['forget_quality'].value:.3g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
