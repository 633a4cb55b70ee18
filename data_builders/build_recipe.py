"""The typed build recipe: nested YAML, overridable from the command line, every fault at once with file and line.

    name: my_pairs
    sources:
      - source: rows                      # a name of `catalogue.SOURCES`; the reader's own options stand beside it
        path: ${HOME}/pairs.jsonl
        licence: CC BY 4.0
    stages:
      - stage: rephrase_text              # a name of `catalogue.STAGES`, with that stage's own options
        model: ...
    parts: {train: 0.7, report: 0.3}
    splits:
      forget: {part: train, where: {polarity: stereotype}}
      report: {part: report}

On the command line a key is reached by dots: `--seed 1 --sources.0.path pairs.jsonl --parts.train 0.6`.
"""

import dataclasses
import difflib
import logging
import os
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from biasunlearn_trainer.data_builders.build_values import Node, Reader, describe_signature, read_node
from biasunlearn_trainer.data_builders.catalogue import SOURCES, STAGES, stage_class
from biasunlearn_trainer.data_builders.images import nearest_files
from biasunlearn_trainer.data_builders.stages import ItemStage, Stage

logger = logging.getLogger(__name__)

CACHE = ".cache"
FOUND = ("file", "left_out")
"""Fields of a recipe that are found when it is read, and no keys of its own."""


class BuildRecipeError(ValueError):
    """Everything that is wrong with a recipe, one sentence a line, each with file and line."""

    def __init__(self, faults: Sequence[str], source: str):
        self.faults = list(faults)
        count = "1 fault" if len(self.faults) == 1 else f"{len(self.faults)} faults"
        super().__init__(f"{source} has {count}:\n" + "\n".join(f"  - {fault}" for fault in self.faults))


@dataclasses.dataclass
class SourceSpec:
    """One source of rows.

    Attributes:
        source: a name of `catalogue.SOURCES`.
        path: a file, a folder or a Hub id; `${NAME}` stands for an environment variable.
        licence: of the rows, where the catalogue does not know it.
        limit: how many rows to take at most, from the start; none: all.
        optional: build without it where there is nothing at its path.
        options: what the reader takes besides.
    """

    source: str
    path: str
    licence: str | None = None
    limit: int | None = None
    optional: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class SplitSpec:
    """One split of the built set.

    Attributes:
        part: of which part its rows are; none: of any.
        where: column and value, or values, that a row must have.
        limit: how many rows at most, drawn by the seed; none: all.
        kind: `report` or `probe` where rows must not be trained on, else `train`. By default told from the name.
        optional: leave it out where no row belongs to it.
        write_as: a benchmark's own format to write beside the Parquet file (stereoset_json), for its task.
    """

    part: str | None = None
    where: dict[str, Any] = dataclasses.field(default_factory=dict)
    limit: int | None = None
    kind: Literal["train", "report", "probe"] | None = None
    optional: bool = False
    write_as: Literal["stereoset_json"] | None = None


@dataclasses.dataclass
class BuildRecipe:
    """A build recipe that passed its checks.

    Attributes:
        name: what the card calls the set.
        sources: where rows come from.
        splits: what is written, by name.
        stages: what they pass through, as objects.
        parts: shares that sum to 1, by name; groups of rows are dealt to them whole.
        part_by: the column that makes the groups; by default each source's own.
        seed: of everything that is drawn.
        output_dir: the folder of the set.
        cache_dir: where stages store what was answered; by default `.cache` in `output_dir`.
        description: a sentence or more for the card.
        drop_duplicates: leave out a row whose texts and pictures a split has already.
        on_leak: what to do where a row of a split to report or probe is trained on: raise, or warn and list it.
        on_near_duplicate: the same for rows that are nearly the same; drop takes them out of the training split.
        near_duplicate_similarity: from which share of common word pairs (Jaccard) two rows are nearly the same.
        hub_private: whether `--push_to_hub` makes a private repository.
        left_out: optional sources that are not there.
    """

    name: str
    sources: list[SourceSpec]
    splits: dict[str, SplitSpec]
    stages: list[Any] = dataclasses.field(default_factory=list)
    parts: dict[str, float] = dataclasses.field(default_factory=lambda: {"all": 1.0})
    part_by: str | None = None
    seed: int = 0
    output_dir: str | None = None
    cache_dir: str | None = None
    description: str = ""
    drop_duplicates: bool = False
    on_leak: Literal["raise", "warn"] = "raise"
    on_near_duplicate: Literal["raise", "warn", "drop"] = "warn"
    near_duplicate_similarity: float = 0.9
    hub_private: bool = True
    left_out: list[str] = dataclasses.field(default_factory=list)
    file: Path | None = None


def read_build_recipe(path: str | Path, overrides: Iterable[str] = ()) -> BuildRecipe:
    """Reads and checks a recipe with its overrides; paths are looked for, nothing is read from them.

    Args:
        path: the YAML file.
        overrides: `--key value`, `--key=value` or `--flag`, keys with dots.

    Raises:
        BuildRecipeError: with every fault at once.
    """
    reader = Reader(str(path))
    root = read_node(Path(path), overrides, reader)
    recipe = None
    if root is not None:
        recipe = _recipe(root, reader)
    if reader.faults:
        raise BuildRecipeError(reader.faults, str(path))
    recipe.file = Path(path)
    recipe.output_dir = recipe.output_dir or os.path.join("data", recipe.name)
    recipe.cache_dir = recipe.cache_dir or os.path.join(recipe.output_dir, CACHE)
    return recipe


def _recipe(root: Node, reader: Reader) -> BuildRecipe | None:
    hints = typing.get_type_hints(BuildRecipe)
    plain = {field.name: hints[field.name] for field in dataclasses.fields(BuildRecipe) if field.name not in FOUND}
    nested = {"sources": _sources, "splits": _splits, "stages": _stages}
    values = reader.mapping(root, plain, required=("name", "sources", "splits"), special=nested)
    if values is None or not {"name", "sources", "splits"} <= set(values):
        return None
    recipe = BuildRecipe(**values)
    recipe.left_out = [spec.source for spec in recipe.sources if spec.path is None]
    recipe.sources = [spec for spec in recipe.sources if spec.path is not None]
    if recipe.left_out:
        absent = f"Sources that were not there: {', '.join(recipe.left_out)}."
        logger.warning("%s: %s", reader.source, absent)
        recipe.description = f"{recipe.description} {absent}".strip()
    _check_whole(recipe, root, reader)
    return recipe


def _sources(node: Node, reader: Reader) -> list[SourceSpec]:
    return [spec for item in reader.items(node, "a source") if (spec := _source(item, reader))]


def _source(node: Node, reader: Reader) -> SourceSpec | None:
    name = reader.choice(node, "source", SOURCES)
    if name is None:
        return None
    own = {"source": str, "path": str, "licence": str | None, "limit": int | None, "optional": bool}
    options = describe_signature(SOURCES[name].read, skip=("path",))
    values = reader.mapping(node, own | options.hints, required=("path", *options.required))
    if values is None or "path" not in values:
        return None
    values["path"] = _expanded(values["path"], node["path"], reader, bool(values.get("optional")))
    if values.get("limit") is not None and values["limit"] < 1:
        reader.fault(node["limit"], f"`limit` must be 1 or more, got {values['limit']}")
    return SourceSpec(
        **{key: values[key] for key in own if key in values},
        options={key: value for key, value in values.items() if key not in own},
    )


def _expanded(path: str, node: Node, reader: Reader, optional: bool) -> str | None:
    """The path with its variables filled in; None where there is nothing and that is no fault."""
    missing = [name for name in re.findall(r"\$\{(\w+)\}", path) if name not in os.environ]
    if missing and optional:
        return None
    if missing:
        reader.fault(
            node, f"`path` needs the environment variable {missing[0]}, which is not set: export it, or write the path"
        )
        return path
    path = os.path.expanduser(os.path.expandvars(path))
    # `owner/name` may be a set of the Hub, which is looked for when it is read.
    is_hub = re.fullmatch(r"[\w.-]+(/[\w.-]+){1,2}", path) and not os.path.exists(path.split("/")[0])
    if not os.path.exists(path) and not is_hub and optional:
        return None
    if not os.path.exists(path) and not is_hub:
        near = nearest_files(path)
        hint = f"; nearest there: {', '.join(near)}" if near else ""
        reader.fault(node, f"there is no source at {path!r}{hint}")
    return path


def _stages(node: Node, reader: Reader) -> list[Stage]:
    return [stage for item in reader.items(node, "a stage") if (stage := _stage(item, reader))]


def _stage(node: Node, reader: Reader) -> Stage | None:
    name = reader.choice(node, "stage", STAGES)
    if name is None:
        return None
    make = stage_class(name)
    signature = describe_signature(make)
    own = {"stage": str, "where": dict[str, Any]}
    values = reader.mapping(node, own | signature.hints, required=signature.required)
    if values is None or not set(signature.required) <= set(values):
        return None
    stage = _made(make, {key: value for key, value in values.items() if key not in own}, node, reader)
    if stage is not None and values.get("where"):
        if not isinstance(stage, ItemStage):
            reader.fault(node["where"], f"`where` belongs to a stage that asks for each row; {name} sees all rows")
        stage.where = values["where"]
    return stage


def _made(make: Callable[..., Stage], values: dict[str, Any], node: Node, reader: Reader) -> Stage | None:
    """The stage; what it objects to itself is a fault of the recipe."""
    try:
        return make(**values)
    except (ValueError, TypeError, OSError, ImportError) as err:
        for line in str(err).splitlines():
            reader.fault(node, line)
        return None


def _splits(node: Node, reader: Reader) -> dict[str, SplitSpec]:
    hints = typing.get_type_hints(SplitSpec)
    splits = {}
    for name, child in reader.children(node, "splits by name"):
        if not re.fullmatch(r"\w+", name):
            reader.fault(child, f"a split is called {name!r}; use letters, digits and _, as `datasets` does")
        values = reader.mapping(child, hints) if child.value is not None else {}
        if values is not None:
            splits[name] = SplitSpec(**values)
    return splits


def _check_whole(recipe: BuildRecipe, root: Node, reader: Reader) -> None:
    """What no key shows alone."""
    if not re.fullmatch(r"[\w.-]+", recipe.name):
        reader.fault(root["name"], f"`name` is {recipe.name!r}; use letters, digits, dots, - and _: it names a folder")
    shares = list(recipe.parts.values())
    if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        reader.fault(root["parts"], f"`parts` must be positive and sum to 1, got {recipe.parts}")
    for name, split in recipe.splits.items():
        if split.part is not None and split.part not in recipe.parts:
            near = difflib.get_close_matches(split.part, recipe.parts, n=1)
            hint = f" (did you mean `{near[0]}`?)" if near else ""
            reader.fault(
                root["splits"][name], f"there is no part {split.part!r}{hint}; parts: {', '.join(recipe.parts)}"
            )
        if split.limit is not None and split.limit < 1:
            reader.fault(root["splits"][name], f"`limit` must be 1 or more, got {split.limit}")
    if not 0 < recipe.near_duplicate_similarity <= 1:
        fault = f"`near_duplicate_similarity` must be above 0 and at most 1, got {recipe.near_duplicate_similarity}"
        reader.fault(root["near_duplicate_similarity"], fault)
    if not recipe.sources and not reader.faults:
        absent = f"; none of those that it names is there: {', '.join(recipe.left_out)}" if recipe.left_out else ""
        reader.fault(root["sources"], f"`sources` is empty; name at least one{absent}")
    if not recipe.splits and not reader.faults:
        reader.fault(root["splits"], "`splits` is empty; name at least one")
