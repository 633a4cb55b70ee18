"""Build the reference answers of a forget set with the original model.

    python -m biasunlearn_trainer.guidance --model MODEL --data FORGET --output DIR

`DIR` becomes the forget set with the columns `guidance`, `guidance_prompt` and `guidance_rejected`, and `guidance.json`
says how they were made. A stopped build goes on where it stopped. Works under `accelerate launch`, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from datasets import Dataset
from datasets.table import embed_table_storage

from biasunlearn_trainer.data_builders.sources.plain import load_rows
from biasunlearn_trainer.eval.schema import write_text
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.fingerprints import model_hash, rows_fingerprint
from biasunlearn_trainer.guidance.build import GuidanceBuilder, put_in, reason_counts
from biasunlearn_trainer.guidance.settings import DEFAULT_FALLBACK, DEFAULT_TEMPLATE, GuidanceSettings
from biasunlearn_trainer.models import load_model, load_processor

ROWS_FILE, RECORD_FILE = "rows.parquet", "guidance.json"


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.guidance", description="Build reference answers for PUBG."
    )
    parser.add_argument("--model", required=True, help="the original model, a folder or Hub id")
    parser.add_argument("--data", required=True, help="the forget set: a file, a folder or a Hub id")
    parser.add_argument("--output", required=True, help="folder for the set with its reference answers")
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="guidance prompt, {prompt} standing for the row's own; several are tried in turn. Default: describe "
        "what is seen, name nobody",
    )
    parser.add_argument("--facts", type=Path, help="text file with one fact a line that no answer may state")
    parser.add_argument(
        "--private_words",
        action="store_true",
        help="every content word of a private text is private by itself; for answers of a word or two",
    )
    parser.add_argument("--fallback", default=DEFAULT_FALLBACK, help=f"answer of rejected rows ({DEFAULT_FALLBACK!r})")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer in tokens (64)")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one forward pass (16)")
    parser.add_argument("--cache_dir", help="where answers are kept; default: the library's cache folder")
    parser.add_argument("--dtype", help="precision of the weights; by default the checkpoint's")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def run(args: argparse.Namespace) -> dict[str, int]:
    """Do what the command line asks for; data are read first, so that a wrong path costs no model loading.

    Returns:
        How many rows got which kind of answer.

    Raises:
        ValueError: for faulty data or settings.
        OSError: where the model, the data or the facts are not there.
    """
    facts = args.facts.read_text(encoding="utf-8").splitlines() if args.facts else []
    settings = GuidanceSettings(
        tuple(args.template or (DEFAULT_TEMPLATE,)),
        tuple(fact.strip() for fact in facts if fact.strip()),
        args.private_words,
        args.fallback,
        args.max_new_tokens,
    )
    rows = load_rows(args.data)
    options = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    model = load_model(args.model, dtype=args.dtype, **options).to(PartialState().device)
    scorer = Scorer(model, load_processor(args.model, **options), args.batch_size)
    answers = GuidanceBuilder(scorer, settings, args.cache_dir).build(rows)
    counts = reason_counts(answers)
    if PartialState().is_main_process:
        record = {
            "model": {"source": args.model, "fingerprint": model_hash(model)},
            "data": {"source": args.data, "fingerprint": rows_fingerprint(rows)},
            "settings": asdict(settings),
            "counts": counts,
        }
        write_set(put_in(rows, answers, settings), Path(args.output), record)
    PartialState().wait_for_everyone()
    return counts


def write_set(rows: Dataset, folder: Path, record: dict) -> None:
    """Write rows with their pictures inside, and how they were made."""
    folder.mkdir(parents=True, exist_ok=True)
    # A set that names picture files would point back to where they lie.
    inside = rows.with_format("arrow").map(embed_table_storage, batched=True, desc="Pictures")
    inside.with_format(None).to_parquet(folder / ROWS_FILE)
    write_text(folder / RECORD_FILE, json.dumps(record, indent=2, ensure_ascii=False) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 with the reason on standard error."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        counts = run(args)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    if PartialState().is_main_process:
        print(", ".join(f"{name} {count}" for name, count in counts.items()))
        print(f"written: {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
