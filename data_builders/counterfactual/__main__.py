"""Tries sentences: `python -m biasunlearn_trainer.data_builders.counterfactual "The nurse said her shift ..."`."""

import argparse
import sys

from biasunlearn_trainer.data_builders.counterfactual.swap import REASONS, swap
from biasunlearn_trainer.data_builders.counterfactual.words import BIAS_TYPES


def main(argv: list[str] | None = None) -> int:
    """Prints the counterfactuals of sentences by bias type, or why there are none; returns 1 where one has none."""
    parser = argparse.ArgumentParser(prog="python -m biasunlearn_trainer.data_builders.counterfactual")
    parser.add_argument("sentence", nargs="+", help="sentences, each in quotation marks; - reads lines from stdin")
    parser.add_argument("--bias_type", choices=BIAS_TYPES, help="only this one; without it, all whose words occur")
    parser.add_argument("--to", metavar="GROUP", help="the group to swap to (needs --bias_type)")
    args = parser.parse_args(argv)
    if args.to and not args.bias_type:
        parser.error("--to needs --bias_type: a group belongs to one.")
    sentences = sys.stdin.read().splitlines() if args.sentence == ["-"] else args.sentence
    try:
        accepted = [_show(sentence, args.bias_type, args.to) for sentence in sentences]
    except ValueError as err:
        parser.error(str(err))
    return 0 if all(accepted) else 1


def _show(sentence: str, bias_type: str | None, to: str | None) -> bool:
    print(sentence)
    results = {name: swap(sentence, name, to) for name in ([bias_type] if bias_type else BIAS_TYPES)}
    shown = {name: result for name, result in results.items() if bias_type or result.reason != "no_term"}
    for name, result in shown.items():
        if result.text is None:
            print(f"  {name}: refused, {result.reason} ({result.detail}): {REASONS[result.reason]}")
        else:
            print(f"  {name}, {result.groups[0]} -> {result.groups[1]}: {result.text}")
    if not shown:
        print("  no word of any table is in it")
    return any(result.text is not None for result in shown.values())


if __name__ == "__main__":
    sys.exit(main())
