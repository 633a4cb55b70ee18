"""Publish a finished run, or merge its adapter: `python -m biasunlearn_trainer.hub push outputs/demo me/my-llava`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from biasunlearn_trainer.hub.finished import PublishError
from biasunlearn_trainer.hub.merging import merge
from biasunlearn_trainer.hub.upload import HubError, push


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0, 2 where the run or the arguments do not do, 1 where the Hub refused or was not reached."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    args = build_parser().parse_args(argv)
    try:
        if args.command == "merge":
            print(f"{merge(args.run_dir, args.output, args.trust_remote_code)}: a whole model, loads with transformers")
        else:
            done = push(
                args.run_dir,
                args.repo_id,
                private=args.private or None,
                revision=args.revision,
                merged=args.merged,
                dry_run=args.dry_run,
                overwrite=args.overwrite,
                base_model=args.base_model,
                license=args.license,
                trust_remote_code=args.trust_remote_code,
            )
            print(f"{done}: nothing was sent" if args.dry_run else done)
    except HubError as err:
        print(err, file=sys.stderr)
        return 1
    except PublishError as err:
        print(err, file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m biasunlearn_trainer.hub", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pushing = commands.add_parser("push", help="publish a run: adapter or model, processor, card, recipe, results")
    pushing.add_argument("run_dir", help="the run's output_dir")
    pushing.add_argument("repo_id", help="OWNER/NAME on the Hub")
    pushing.add_argument("--private", action="store_true", help="make the repository private")
    pushing.add_argument("--revision", help="branch to commit to, made where it is not there; default main")
    pushing.add_argument("--merged", action="store_true", help="publish the adapter merged into its base")
    pushing.add_argument("--dry_run", metavar="FOLDER", help="write the files into this new folder and send nothing")
    pushing.add_argument("--overwrite", action="store_true", help="publish into a repository that holds something else")
    pushing.add_argument("--base_model", metavar="ID", help="the base's Hub id, where the run read it from a folder")
    pushing.add_argument("--license", metavar="NAME", help="licence of the weights, by the Hub's name: apache-2.0, ...")
    merging = commands.add_parser("merge", help="write base and adapter as one model")
    merging.add_argument("run_dir", help="the run's output_dir")
    merging.add_argument("output", help="a new folder")
    for command in (pushing, merging):
        command.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the base")
    return parser


if __name__ == "__main__":
    sys.exit(main())
