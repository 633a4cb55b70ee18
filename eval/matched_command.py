"""Compare finished runs at matched forgetting from the command line.

    python -m biasunlearn_trainer.eval.compare --at forget_vqa=0.15 --keep forget_qa retain_vqa \
        --choose_on entities@validation --report_on entities@report RUN [RUN ...]

RUN is a run's folder or one above several. Runs that differ in `--settings` alone (the learning rate) are one method,
tuned; those that differ in `--units` (seed, forget split) are what it is repeated on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from biasunlearn_trainer.eval.matched import Matching, compare_matched, matched_markdown
from biasunlearn_trainer.eval.runs import SETTINGS, UNITS, find_runs, read_points


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit status: 0, or 2 where the runs cannot be compared, with the reason on stderr.
    """
    options = _parser().parse_args(arguments)
    try:
        matching = Matching.of(
            {
                "at": dict(_limit(text) for text in options.at),
                "keep": options.keep,
                "choose_on": options.choose_on,
                "report_on": options.report_on,
                "against": options.against,
            }
        )
        points = read_points(
            find_runs(options.runs), matching.choose_on, matching.report_on, options.settings, options.units
        )
        comparisons = compare_matched(points, matching)
    except (ValueError, OSError) as err:
        print(err, file=sys.stderr)
        return 2
    print(matched_markdown(comparisons, matching))
    if options.figure:
        from biasunlearn_trainer.eval.report.tradeoff import build_tradeoff_figure

        build_tradeoff_figure(points, comparisons, matching).savefig(options.figure)
        print(f"\nPicture {options.figure}")
    return 0


def _limit(text: str) -> tuple[str, float]:
    metric, _, most = text.partition("=")
    try:
        return metric, float(most)
    except ValueError as err:
        raise ValueError(f"--at {text!r}: expected METRIC=HIGHEST, for instance forget_vqa=0.15.") from err


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.eval.compare", description="Compares finished runs at matched forgetting."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders of finished runs, or folders above them")
    parser.add_argument("--at", nargs="+", required=True, metavar="METRIC=HIGHEST", help="what counts as forgotten")
    parser.add_argument("--keep", nargs="+", required=True, metavar="METRIC", help="what is to stay, higher is better")
    parser.add_argument("--choose_on", required=True, metavar="TASK", help="the task that chooses setting and step")
    parser.add_argument("--report_on", required=True, metavar="TASK", help="the task that is reported, on other items")
    parser.add_argument("--against", metavar="METHOD", help="compare with this method (default: the first)")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="KEY", help="recipe keys that are tuned")
    parser.add_argument("--units", nargs="+", default=UNITS, metavar="KEY", help="recipe keys that pairs share")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the trade-off too")
    return parser
