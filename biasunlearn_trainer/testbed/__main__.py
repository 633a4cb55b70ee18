"""Build a testbed from the command line: `python -m biasunlearn_trainer.testbed llava`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from biasunlearn_trainer.testbed.build import RECIPES, build, describe


def main(argv: Sequence[str] | None = None) -> None:
    """Build what is asked for, and print where it lies and what its models answer right."""
    parser = argparse.ArgumentParser(prog="python -m biasunlearn_trainer.testbed", description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES), help="which testbed")
    parser.add_argument("--cache_dir", help="where to keep it; default $BIASUNLEARN_CACHE or ~/.cache/biasunlearn")
    parser.add_argument("--data_dir", help="folder of the open data sets, for stereoset; default $BIASUNLEARN_DATA")
    parser.add_argument("--seed", type=int, help="another seed than the default: another world, other weights")
    parser.add_argument("--contact_sheet", type=Path, metavar="FILE.png", help="also draw example rows into this file")
    args = parser.parse_args(argv)
    testbed = build(args.name, cache_dir=args.cache_dir, data_dir=args.data_dir, seed=args.seed)
    print("\n".join(describe(testbed)))
    if args.contact_sheet:
        if not testbed.tasks[0].startswith(("planted=", "entities@")):
            parser.error(f"--contact_sheet draws worlds of pictures or scenes; {args.name} has none.")
        from biasunlearn_trainer.testbed.contact_sheet import draw_contact_sheet

        draw_contact_sheet(testbed, args.contact_sheet)
        print(f"wrote {args.contact_sheet}")


if __name__ == "__main__":
    main()
