"""Makes the sets that the recipes on real data name, from a copy of the data on disk or, where it says Hub, from there.

    python recipes/prepare_data.py pairs PATH_TO_PAIRS --output data/pairs
    python recipes/prepare_data.py stereoset PATH_TO_STEREOSET --text PATH_TO_WIKITEXT --output data/stereoset
    python recipes/prepare_data.py mllmu_bench MLLMMU/MLLMU-Bench/forget_5 --output data/mllmu_bench       # Hub or disk
    python recipes/prepare_data.py clear therem/CLEAR/forget05 --output data/clear                         # Hub or disk
    python recipes/prepare_data.py tofu locuslab/TOFU/forget10 --output data/tofu                          # Hub or disk
    python recipes/prepare_data.py sb_bench ucf-crcv/SB-Bench/real --output data/sb_bench                  # Hub or disk
    python recipes/prepare_data.py image_bbq PATH_TO_JSONL --output data/image_bbq

What is trained on, probed and reported never shares a scenario (PAIRS), a target term (StereoSet) or a template
(SB-Bench, image BBQ). docs/benchmarks.md says what the sets of the others hold.
"""

import argparse
import json
from pathlib import Path

from biasunlearn_trainer.data_builders.sources import clear, mllmu_bench, pairs, passages, sb_bench, stereoset, tofu
from biasunlearn_trainer.data_builders.sources.people import method_sets, prompt_and_completion, to_rows
from biasunlearn_trainer.data_builders.sources.pictured_rows import PicturedRows
from biasunlearn_trainer.data_builders.sources.pictured_rows import write_jsonl as write_pictured


def write_jsonl(rows: list[dict], path: Path) -> None:
    """Writes rows one a line and says how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def prepare_pairs(source: Path, output: Path, seed: int) -> None:
    """Stereotyped guesses to forget; "cannot be known" to retain, on other scenarios; the report asks for both."""
    images = pairs.read_pairs(source.resolve())
    parts = pairs.split_by_scenario(images, {"forget": 0.5, "retain": 0.25, "report": 0.25}, seed)
    write_jsonl(pairs.to_rows(parts["forget"], "stereotype"), output / "forget.jsonl")
    write_jsonl(pairs.to_rows(parts["forget"], "neutral"), output / "preferred.jsonl")
    write_jsonl(pairs.to_rows(parts["retain"], "neutral"), output / "retain.jsonl")
    biased = pairs.to_rows(parts["report"], "stereotype")
    report = [
        {**row, "kind": "ambiguous", "rejected": other["completion"]}
        for row, other in zip(pairs.to_rows(parts["report"], "neutral"), biased, strict=True)
    ]
    write_jsonl(report, output / "report.jsonl")


def prepare_stereoset(source: Path, output: Path, seed: int, text: Path | None = None) -> None:
    """Stereotypes to forget, anti-stereotypes to retain, unrelated text to stay the same on.

    The splits are written in StereoSet's own JSON too. Unrelated are the third sentences of the training items and,
    where there is a text, its passages.
    """
    items = stereoset.read_stereoset(source)
    parts = stereoset.split_by_target(items, {"train": 0.5, "probe": 0.2, "report": 0.3}, seed)
    write_jsonl(stereoset.to_rows(parts["train"], "stereotype"), output / "forget.jsonl")
    write_jsonl(stereoset.to_rows(parts["train"], "anti_stereotype"), output / "retain.jsonl")
    utility = stereoset.to_rows(parts["train"], "unrelated")
    write_jsonl(utility + (passages.read_passages(text, seed=seed) if text else []), output / "utility.jsonl")
    for name in parts:
        stereoset.write_json(parts[name], output / f"{name}.json")
        print(f"{output / name}.json: {len(parts[name])} items")


def write_parts(parts: list[PicturedRows], path: Path) -> None:
    """Writes rows with their pictures and says how many."""
    print(f"{path}: {write_pictured(parts, path)} rows")


def prepare_people(dataset: str, source: Path, output: Path, chat: bool, text_task: str) -> None:
    """The forget, retain and preserve set of MMUnlearner from MLLMU-Bench or CLEAR."""
    if dataset == "mllmu_bench":
        questions = mllmu_bench.read_method_questions(source, text_task)
    else:
        questions = clear.read_method_questions(source)
    for name, parts in method_sets(*questions, chat=chat).items():
        write_parts(parts, output / f"{name}.jsonl")


def prepare_tofu(source: Path, output: Path, chat: bool, refusals: Path | None) -> None:
    """Questions about the authors to forget and about the others; refusals are preferred answers to the former."""
    forget = tofu.read_questions(source)
    write_parts([to_rows(forget, chat)], output / "forget.jsonl")
    write_parts([to_rows(tofu.read_questions(tofu.retain_path(source)), chat)], output / "retain.jsonl")
    if refusals is not None:
        sayings = tofu.read_refusals(refusals)
        rows = [
            prompt_and_completion(question.question, sayings[number % len(sayings)], chat)
            for number, question in enumerate(forget)
        ]
        write_jsonl(rows, output / "preferred.jsonl")


def prepare_sb_bench(dataset: str, source: Path, output: Path, seed: int) -> None:
    """Stereotyped answers to forget; the right ones to retain, of other templates; the report asks for both."""
    items = sb_bench.read_sb_bench(source) if dataset == "sb_bench" else sb_bench.read_image_bbq(source)
    parts = sb_bench.split_by_template(items, {"forget": 0.5, "retain": 0.25, "report": 0.25}, seed)
    to_forget = [item for item in parts["forget"] if item.condition == "ambig" and item.biased is not None]
    write_parts([sb_bench.to_rows(to_forget, "stereotype")], output / "forget.jsonl")
    write_parts([sb_bench.to_rows(to_forget, "neutral")], output / "preferred.jsonl")
    write_parts([sb_bench.to_rows(parts["retain"], "neutral")], output / "retain.jsonl")
    write_parts([sb_bench.to_report_rows(parts["report"])], output / "report.jsonl")


def build_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["pairs", "stereoset", "mllmu_bench", "clear", "tofu", "sb_bench", "image_bbq"]
    parser.add_argument("dataset", choices=names)
    parser.add_argument("source", type=Path, help="the copy on disk, or ROOT/CONFIG on disk or the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder for the sets")
    parser.add_argument("--seed", type=int, default=0, help="what a split depends on")
    parser.add_argument("--text", type=Path, help="stereoset: a text file, plain or .gz, for the utility set")
    parser.add_argument("--plain", action="store_true", help="mllmu_bench, clear, tofu: plain text, not chat messages")
    parser.add_argument(
        "--text_task",
        choices=["choice", "generation"],
        default="choice",
        help="mllmu_bench: which text questions the preserve set takes (choice, as MMUnlearner's code)",
    )
    parser.add_argument("--refusals", type=Path, help="tofu: idontknow.jsonl of its code, for preferred.jsonl")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Makes the sets that the command line asks for."""
    options = build_parser().parse_args(argv)
    options.output.mkdir(parents=True, exist_ok=True)
    if options.dataset == "pairs":
        prepare_pairs(options.source, options.output, options.seed)
    elif options.dataset == "stereoset":
        prepare_stereoset(options.source, options.output, options.seed, options.text)
    elif options.dataset == "tofu":
        prepare_tofu(options.source, options.output, not options.plain, options.refusals)
    elif options.dataset in ("mllmu_bench", "clear"):
        prepare_people(options.dataset, options.source, options.output, not options.plain, options.text_task)
    else:
        prepare_sb_bench(options.dataset, options.source, options.output, options.seed)


if __name__ == "__main__":
    main()
