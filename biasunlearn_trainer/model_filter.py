"""Keeps the items of a debiasing benchmark on which a model prefers the biased sentence.

    python -m biasunlearn_trainer.model_filter --model MODEL --data data/debias_benchmark --output data/debias_MODEL

DATA is a set that `recipes/data/debias_benchmark.yaml` built. Every item is scored once, by its reliability row, and
stays in all splits or in none; locality rows stay. OUTPUT gets the same splits, the card, and `filter.json` with the
counts. By construction the model itself has a reliability of 0 there: that is where unlearning begins.

Source: "Debiasing Multimodal Large Language Models via Model Editing", equation 4 and section 3.3.1.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset

from biasunlearn_trainer.data_builders.debias_benchmark import keep_stereotyped
from biasunlearn_trainer.data_builders.sources.pictured_rows import PicturedRows, StoredPicture, picture_table

logger = logging.getLogger(__name__)

CARD, RECORD, DATA = "README.md", "filter.json", "data"


class Sets:
    """The splits of a built set; pictures stay on disk until they are scored.

    Args:
        folder: of the built set.

    Raises:
        FileNotFoundError: it holds no Parquet files in `data`.

    Attributes:
        sets: by name of the split.
        rows: of all splits in order, without pictures, each with its split and place as (name, number).
        places: the same.
    """

    def __init__(self, folder: Path):
        files = sorted((folder / DATA).glob("*.parquet"))
        if not files:
            raise FileNotFoundError(f"{folder} is no built set: it has no {DATA}/SPLIT.parquet.")
        self.sets: dict[str, Dataset] = {
            file.stem: load_dataset("parquet", data_files=str(file), split="train") for file in files
        }
        self.rows: list[dict[str, Any]] = []
        self.places: list[tuple[str, int]] = []
        for name, dataset in self.sets.items():
            texts = dataset.select_columns([column for column in dataset.column_names if column != "images"])
            self.rows += texts.with_format("arrow")[:].to_pylist()
            self.places += [(name, number) for number in range(len(dataset))]

    def scored(self, places: Sequence[int], column: str) -> PicturedRows:
        """The rows at some places, with the text of a column as their completion."""
        tables = {name: picture_table(d, "images") for name, d in self.sets.items() if "images" in d.column_names}
        found = [self.places[place] for place in places]
        pictures = [StoredPicture(tables[name], number) for name, number in found]
        return PicturedRows([{**self.rows[p], "completion": self.rows[p][column]} for p in places], pictures)


def filter_set(folder: str | Path, output: str | Path, scorer: Any, model: str) -> dict[str, Any]:
    """Writes the splits of a set with the items on which a model prefers the biased sentence.

    Args:
        folder: of the built set.
        output: another folder.
        scorer: `eval.scoring.Scorer` around the model.
        model: its name, for the record.

    Returns:
        The record: the model, items by bias type ("kept", "of"), rows by split.

    Raises:
        ValueError: the two folders are one, the set has no reliability rows, or the model prefers no biased sentence.
    """
    folder, output = Path(folder).expanduser(), Path(output).expanduser()
    if folder.resolve() == output.resolve():
        raise ValueError(f"--output must be another folder than --data, got {folder} for both.")
    sets = Sets(folder)
    place_of = {id(row): place for place, row in enumerate(sets.rows)}

    def prefers_stereotype(rows: Sequence[dict]) -> list[bool]:
        places = [place_of[id(row)] for row in rows]
        less, more = (
            scorer.score(sets.scored(places, column), desc=column, append_eos=False)
            for column in ("completion", "rejected")
        )
        return [m.logp > fair.logp for m, fair in zip(more, less, strict=True)]

    stay, counts = keep_stereotyped(sets.rows, prefers_stereotype)
    if not any(kept for _, kept in counts):
        raise ValueError(f"{model} prefers the biased sentence of none of the {counts.total()} items; none is left.")
    record = {
        "model": model,
        "items": {
            bias_type: {
                "kept": counts[bias_type, True],
                "of": counts[bias_type, True] + counts[bias_type, False],
            }
            for bias_type in sorted({bias_type for bias_type, _ in counts})
        },
        "rows": _write(sets, stay, output),
    }
    (output / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if (folder / CARD).is_file():
        shutil.copy(folder / CARD, output / CARD)
        with open(output / CARD, "a", encoding="utf-8") as card:
            card.write(_section(record))
    return record


def _write(sets: Sets, stay: Sequence[int], output: Path) -> dict[str, dict[str, int]]:
    """Writes the splits; one that loses all rows is left out."""
    (output / DATA).mkdir(parents=True, exist_ok=True)
    numbers: dict[str, list[int]] = {name: [] for name in sets.sets}
    for name, number in (sets.places[place] for place in stay):
        numbers[name].append(number)
    for name, kept in numbers.items():
        file = output / DATA / f"{name}.parquet"
        if kept:
            sets.sets[name].select(kept).to_parquet(str(file))
        else:
            logger.warning("%s is left out: none of its items is left.", name)
            file.unlink(missing_ok=True)
    return {name: {"kept": len(kept), "of": len(sets.sets[name])} for name, kept in numbers.items()}


def _section(record: dict[str, Any]) -> str:
    lines = [f"| {name} | {n['kept']} | {n['of']} |" for name, n in record["items"].items()]
    return "\n".join(
        [
            f"\n## Items on which {record['model']} prefers the biased sentence",
            "\nThe tables above are those of the whole set; its splits hold these items and all locality rows.",
            "\n| bias type | kept | of |",
            "| --- | --- | --- |",
            *lines,
            "",
        ]
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.model_filter",
        description="Keeps the items of a debiasing benchmark on which a model prefers the biased sentence.",
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of a model, or folder of an adapter")
    parser.add_argument("--data", required=True, help="folder of the built set")
    parser.add_argument("--output", required=True, help="folder for the items that stay")
    parser.add_argument("--batch_size", type=int, default=16, help="rows of one forward pass (16)")
    parser.add_argument("--dtype", help="precision of the weights, for instance bfloat16; by default the checkpoint's")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub model")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point: 0, or 2 with the reason on standard error."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        if not (Path(args.data) / DATA).is_dir():
            raise FileNotFoundError(f"{args.data} is no built set: it has no folder {DATA}.")
        record = filter_set(args.data, args.output, _scorer(args), args.model)
    except (ValueError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 2
    items = Counter({name: n["kept"] for name, n in record["items"].items()})
    for name, n in record["items"].items():
        print(f"{name}: {n['kept']} of {n['of']} items")
    print(f"written: {items.total()} items to {args.output}")
    return 0


def _scorer(args: argparse.Namespace) -> Any:
    from accelerate import PartialState

    from biasunlearn_trainer.eval.scoring import Scorer
    from biasunlearn_trainer.models import load_model, load_processor

    loading = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    model = load_model(args.model, dtype=args.dtype, **loading).to(PartialState().device)
    return Scorer(model, load_processor(args.model, **loading), batch_size=args.batch_size)


if __name__ == "__main__":
    sys.exit(main())
