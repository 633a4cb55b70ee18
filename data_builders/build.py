"""Builds a set from a recipe: sources, stages, splits, checks, card.

    python -m biasunlearn_trainer.data_builders.build RECIPE.yaml                       # builds
    python -m biasunlearn_trainer.data_builders.build RECIPE.yaml --preview 5           # shows five rows a source
    python -m biasunlearn_trainer.data_builders.build RECIPE.yaml --seed 1 --sources.0.path my.jsonl
    python -m biasunlearn_trainer.data_builders.build RECIPE.yaml --push_to_hub OWNER/NAME
    accelerate launch -m biasunlearn_trainer.data_builders.build RECIPE.yaml            # pictures on several devices

What an expensive stage was answered is stored as it comes: a build that was killed continues when the same command is
run again, and asks for nothing twice.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from biasunlearn_trainer.data_builders.assemble import (
    CARD,
    DATA_FOLDER,
    REJECTS,
    REPORT,
    SHEET,
    Assembly,
    BuildError,
    disk_error,
    move_into_place,
    reject_line,
)
from biasunlearn_trainer.data_builders.build_recipe import (
    CACHE,
    BuildRecipe,
    BuildRecipeError,
    SourceSpec,
    read_build_recipe,
)
from biasunlearn_trainer.data_builders.card import BuildReport
from biasunlearn_trainer.data_builders.catalogue import SOURCES, sharing_fault
from biasunlearn_trainer.data_builders.contact_sheet import draw_contact_sheet
from biasunlearn_trainer.data_builders.near_duplicates import plain_text
from biasunlearn_trainer.data_builders.processes import Processes, share
from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.data_builders.stages import Reject, Stage, StageError, run_stages
from biasunlearn_trainer.data_builders.store import Store, StoreError
from biasunlearn_trainer.data_builders.written_set import RowSpool
from biasunlearn_trainer.version import __version__

logger = logging.getLogger(__name__)

PARTIAL, SPOOL, LOCK = ".partial", "rows.jsonl", "build.lock"
PACKAGES = ("datasets", "pyarrow", "numpy", "transformers", "diffusers", "openai")


class _Counts:
    """What flows through a build: rows by source, rows in and out of each stage, rejects by stage and reason."""

    def __init__(self, rejects_file: Any = None):
        self.sources: Counter[int] = Counter()
        self.stages: dict[int, list[int]] = {}
        self.items: Counter[bool] = Counter()
        self.attempts: Counter[int] = Counter()
        self.rejects: dict[str, Counter[str]] = {}
        self._file = rejects_file

    def reject(self, reject: Reject) -> None:
        self.rejects.setdefault(reject.stage, Counter())[reject.reason] += 1
        if self._file is not None:
            self._file.write(reject_line(reject))

    def item(self, stage: Stage, was_stored: bool, attempts: int) -> None:
        self.items[was_stored] += 1
        self.attempts[id(stage)] += attempts

    def through(self, rows: Iterable[dict], stage: int, place: int) -> Iterator[dict]:
        counts = self.stages.setdefault(stage, [0, 0])
        for row in rows:
            counts[place] += 1
            yield row


def source_rows(spec: SourceSpec, part_by: str | None = None) -> Iterator[dict]:
    """Reads a source; each row has in `part_group` what is kept whole when rows are dealt to parts.

    Raises:
        BuildError: a row lacks the column that `part_by` names.
    """
    source = SOURCES[spec.source]
    column = part_by or source.group
    for number, row in enumerate(islice(source.read(spec.path, **spec.options), spec.limit)):
        if part_by is not None and row.get(column) is None:
            raise BuildError(
                f"`part_by` is {part_by!r}, which row {number} of {spec.source} lacks; it has {sorted(row)}."
            )
        yield {**row, "part_group": f"{spec.source}:{row.get(column) or number}"}


def _through_stages(rows: Iterable[dict], recipe: BuildRecipe, counts: _Counts) -> Iterable[dict]:
    for number, stage in enumerate(recipe.stages):
        rows = counts.through(rows, number, 0)
        rows = run_stages(rows, [stage], recipe.cache_dir, counts.reject, counts.item)
        rows = counts.through(rows, number, 1)
    return _with_groups(rows)


def _with_groups(rows: Iterable[dict]) -> Iterator[dict]:
    """Gives a row that a stage made anew the group of the row before it, if they are of one pair."""
    group_of: dict[str, str] = {}
    for row in rows:
        pair = str(row.get("pair_id"))
        group = row.get("part_group") or group_of.get(pair, f"pair:{pair}")
        group_of = {pair: group}
        yield {**row, "part_group": group}


def _with_progress(rows: Iterable[dict], counts: _Counts, show: bool) -> Iterator[dict]:
    from tqdm.auto import tqdm

    with tqdm(rows, desc="rows", unit=" rows", disable=None if show else True, mininterval=0.5) as bar:
        for row in bar:
            if counts.items or counts.rejects:
                rejected = sum(count.total() for count in counts.rejects.values())
                bar.set_postfix(asked=counts.items[False], stored=counts.items[True], rejected=rejected, refresh=False)
            yield row


def preview(recipe: BuildRecipe, num_rows: int) -> list[dict]:
    """Sends the first rows of each source through the stages; writes nothing but what the stages store.

    Args:
        recipe: of the build.
        num_rows: rows taken of each source.

    Returns:
        The rows that came through; those that were left out carry `rejected_because`.
    """
    counts, left_out = _Counts(), []
    counts.reject = lambda reject: left_out.append(
        {**reject.row, "rejected_because": f"{reject.stage}: {reject.reason}"}
    )
    rows = (row for spec in recipe.sources for row in islice(source_rows(spec, recipe.part_by), num_rows))
    return [*_through_stages(rows, recipe, counts), *left_out]


def build(recipe: BuildRecipe, show_progress: bool = True, processes: Processes | None = None) -> BuildReport:
    """Builds the set of a recipe into its `output_dir`.

    Args:
        recipe: checked.
        show_progress: a progress bar where the output is a terminal.
        processes: that share the expensive items; the others call `processes.share`. None: this one is alone.

    Returns:
        What was found and written; `README.md`, `build.json`, `rejects.jsonl` and `data/SPLIT.parquet` say the same.

    Raises:
        BuildError: a split without rows, near duplicates that were not to be there, a disk that is full.
        StageError: a stage cannot go on; what was answered is kept.
        ValueError: leaking rows, or rows of a source that cannot be used.
    """
    folder, cache = Path(recipe.output_dir), Path(recipe.cache_dir)
    partial = folder / PARTIAL
    try:
        partial.mkdir(parents=True, exist_ok=True)
        # The locks of these stores keep a second build away, of the same folder or with the same cache.
        locks = {path.resolve() for path in (cache / LOCK, folder / CACHE / LOCK)}
        with contextlib.ExitStack() as stack:
            for path in sorted(locks):
                stack.enter_context(Store(path))
            rejects = stack.enter_context(open(partial / REJECTS, "w", encoding="utf-8"))
            if processes is not None and processes.count > 1:
                share(processes, recipe.stages, cache, lambda: _all_rows(recipe, _Counts()))
            return _build(recipe, folder, partial, _Counts(rejects), rejects, show_progress)
    except OSError as err:
        if isinstance(err, FileNotFoundError | ConnectionError):
            raise
        raise disk_error(err, recipe) from err


def _build(
    recipe: BuildRecipe, folder: Path, partial: Path, counts: _Counts, rejects: Any, show_progress: bool
) -> BuildReport:
    spool = RowSpool(Path(recipe.cache_dir) / SPOOL)
    read = _all_rows(recipe, counts)
    spool.write(_with_progress(_through_stages(read, recipe, counts), counts, show_progress))
    if not spool.num_rows:
        raise BuildError(_none_left(counts, partial / REJECTS))
    report = BuildReport(recipe.name, recipe.description, recipe.seed)
    report.sources = [_source_report(spec, counts.sources[number]) for number, spec in enumerate(recipe.sources)]
    report.stages = [
        {
            "name": stage.name,
            "settings": _settings(stage),
            "rows_in": passed[0],
            "attempts": counts.attempts[id(stage)] or None,
            "rows_out": passed[1],
        }
        for stage, passed in ((s, counts.stages.get(n, [0, 0])) for n, s in enumerate(recipe.stages))
    ]
    assembly = Assembly(recipe, spool, partial, counts.reject, report)
    assembly.check_duplicates()
    assembly.write()
    assembly.check_leakage()
    report.rejects = {stage: dict(reasons.most_common()) for stage, reasons in sorted(counts.rejects.items())}
    assembly.write_card()
    text = json.dumps(_record(recipe, report), indent=2, ensure_ascii=False, default=str)
    (partial / REPORT).write_text(text + "\n", encoding="utf-8")
    rejects.close()
    move_into_place(partial, folder)
    spool.remove()
    return report


def _none_left(counts: _Counts, rejects: Path) -> str:
    """Says why no row came through."""
    reasons = [
        f"{stage}: " + ", ".join(f"{reason} {count}" for reason, count in found.most_common())
        for stage, found in sorted(counts.rejects.items())
    ]
    told = f" Left out by {'; '.join(reasons)}. {rejects} has each." if reasons else ""
    return f"no row came through the stages, of {sum(counts.sources.values())} that were read.{told}"


def _all_rows(recipe: BuildRecipe, counts: _Counts) -> Iterator[dict]:
    """The rows of all sources in order, counted."""
    for number, spec in enumerate(recipe.sources):
        for row in source_rows(spec, recipe.part_by):
            counts.sources[number] += 1
            yield row


def _source_report(spec: SourceSpec, num_rows: int) -> dict[str, Any]:
    source = SOURCES[spec.source]
    return {
        "source": spec.source,
        "title": source.title,
        "licence": spec.licence or source.licence,
        "url": source.url,
        "note": source.note,
        "num_rows": num_rows,
    }


def _settings(stage: Stage) -> dict[str, Any]:
    """A stage's settings, how often it may ask, and to which rows it was confined."""
    more = {name: getattr(stage, name, None) for name in ("max_attempts", "where")}
    return {**stage.settings, **{name: value for name, value in more.items() if value}}


def _record(recipe: BuildRecipe, report: BuildReport) -> dict[str, Any]:
    versions = {"python": platform.python_version(), "biasunlearn_trainer": __version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    stages = [{"stage": stage.name, **_settings(stage)} for stage in recipe.stages]
    settings = {f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe) if f.name not in ("stages", "file")}
    # The record is passed on with the set: names of files, no folders of this machine.
    settings = {key: value for key, value in settings.items() if key not in ("output_dir", "cache_dir")}
    settings["sources"] = [{**dataclasses.asdict(spec), "path": Path(spec.path).name} for spec in recipe.sources]
    settings["splits"] = {name: dataclasses.asdict(split) for name, split in recipe.splits.items()}
    return {"report": dataclasses.asdict(report), "recipe": {**settings, "stages": stages}, "versions": versions}


def refuse_unshareable(recipe: BuildRecipe) -> None:
    """Raises a BuildError that names every source whose licence does not allow the set to be passed on."""
    faults = []
    for spec in recipe.sources:
        fault = sharing_fault(spec.licence or SOURCES[spec.source].licence)
        if fault:
            faults.append(f"  - {SOURCES[spec.source].title} ({spec.path}): {fault}")
    if faults:
        raise BuildError(f"{recipe.name} cannot be pushed to the Hub:\n" + "\n".join(faults))


def push_to_hub(recipe: BuildRecipe, repo_id: str) -> str:
    """Uploads the built set; the caches stay here.

    Args:
        recipe: of a set that was built.
        repo_id: OWNER/NAME; the repository is made where it is not there, private unless `hub_private` is false.

    Returns:
        The repository's address.

    Raises:
        BuildError: a licence does not allow it, or nothing was built yet.
    """
    from huggingface_hub import HfApi

    refuse_unshareable(recipe)
    folder = Path(recipe.output_dir)
    if not (folder / CARD).is_file():
        raise BuildError(f"there is no built set in {folder}; build it first.")
    api = HfApi()
    url = api.create_repo(repo_id, repo_type="dataset", private=recipe.hub_private, exist_ok=True)
    patterns = [CARD, REPORT, REJECTS, SHEET, f"{DATA_FOLDER}/*"]
    api.upload_folder(repo_id=repo_id, repo_type="dataset", folder_path=folder, allow_patterns=patterns)
    return str(url)


def _print_preview(rows: Sequence[dict], recipe: BuildRecipe) -> None:
    for row in rows:
        shown = {key: value for key, value in row.items() if value is not None and key not in ("prompt", "completion")}
        print(f"{plain_text(row['prompt'])} | {plain_text(row['completion'])}")
        print("    " + ", ".join(f"{key}={value}" for key, value in shown.items()))
    sheet = Path(recipe.output_dir) / f"preview_{SHEET}"
    if draw_contact_sheet(rows, sheet):
        print(f"{sheet}: the pictures of these rows")


def build_parser() -> argparse.ArgumentParser:
    """The command line's own options; any other `--key value` changes the recipe."""
    parser = argparse.ArgumentParser(
        prog="python -m biasunlearn_trainer.data_builders.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="the YAML file")
    parser.add_argument("--preview", type=int, metavar="N", help="show N rows of each source and write no set")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the set when it is built")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Builds what the command line asks for; returns the exit code."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    options, overrides = build_parser().parse_known_args(argv)
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        if options.preview is not None and options.preview < 1:
            raise BuildError(f"`--preview` must be 1 or more, got {options.preview}.")
        recipe = read_build_recipe(options.recipe, overrides)
        if options.push_to_hub:
            refuse_unshareable(recipe)
    except (BuildRecipeError, BuildError, InvalidDataset, ValueError, OSError) as err:
        if is_main:
            print(err, file=sys.stderr)
        return 1
    try:
        if not options.preview:
            return _build_together(recipe, options.push_to_hub)
        if is_main:
            _print_preview(preview(recipe, options.preview), recipe)
    except (BuildError, StageError, StoreError, InvalidDataset, ValueError, OSError) as err:
        print(err, file=sys.stderr)
        return 1
    return 0


def _build_together(recipe: BuildRecipe, repo_id: str | None) -> int:
    processes = Processes()
    if processes.is_main:
        _build_and_tell(recipe, repo_id, processes)
    else:
        share(processes, recipe.stages, Path(recipe.cache_dir))
    processes.leave()
    return 0


def _build_and_tell(recipe: BuildRecipe, repo_id: str | None, processes: Processes) -> None:
    report = build(recipe, processes=processes)
    for name, split in report.splits.items():
        print(f"{Path(recipe.output_dir) / DATA_FOLDER / name}.parquet: {split.num_rows} rows")
    for stage, reasons in report.rejects.items():
        print(f"left out by {stage}: " + ", ".join(f"{reason} {count}" for reason, count in reasons.items()))
    if repo_id:
        print(push_to_hub(recipe, repo_id))


if __name__ == "__main__":
    sys.exit(main())
