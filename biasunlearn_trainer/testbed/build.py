"""From a recipe to a folder with models, data sets and a manifest."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.testbed.cache import MANIFEST, build_once
from biasunlearn_trainer.testbed.recipe import (
    FORMAT_VERSION,
    EntitiesRecipe,
    QFormerWorldRecipe,
    Recipe,
    StereoSetRecipe,
    TraitsRecipe,
    VisionModelSize,
    WorldRecipe,
    recipe_key,
)

RECIPES: dict[str, Recipe] = {
    "llava": WorldRecipe(),
    "qwen2vl": WorldRecipe(name="qwen2vl", steps=1300, vision_model=VisionModelSize(patch_size=4)),
    "blip2": QFormerWorldRecipe(name="blip2", steps=900),
    "minigpt4": QFormerWorldRecipe(name="minigpt4", steps=900),
    "llama": WorldRecipe(name="llama", steps=600),  # words are learned sooner than pictures
    "traits": TraitsRecipe(),
    "stereoset": StereoSetRecipe(),
    "entities": EntitiesRecipe(),
}
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pillow")


@dataclass(frozen=True)
class Testbed:
    """A built testbed.

    Attributes:
        name: `llava`, `qwen2vl`, `blip2`, `minigpt4`, `llama`, `traits`, `stereoset` or `entities`.
        model_path: the planted model with its processor or tokenizer, a folder for `load_model` and `load_processor`.
        oracle_path: its unbiased twin, in the same layout; None where the truth is not known.
        instruct_path: the planted model after an instruction tuning that left its bias in place, in the same layout and
            with weights of the same shapes, so that an adapter of one loads into the other; None where there is none.
        datasets: folder of each training stream: `forget`, `retain`, and `preferred` or `utility` where there is one;
            of `entities` the sets of one forget split.
        tasks: specs of the evaluation tasks, `NAME[@LABEL]=PATH`.
        instruct_tasks: further specs, for the instruct model alone; empty where there is none.
        manifest: recipe, versions, row counts and what the models answer right.
    """

    __test__ = False  # keeps pytest from collecting it for its name

    name: str
    model_path: str
    oracle_path: str | None
    instruct_path: str | None
    datasets: dict[str, str]
    tasks: list[str]
    instruct_tasks: list[str]
    manifest: dict[str, Any]

    @property
    def folder(self) -> Path:
        """Where everything of the testbed lies."""
        return Path(self.model_path).parent

    def with_split(self, name: str) -> Testbed:
        """The same testbed with the sets and tasks of another forget split; the model is the same.

        Args:
            name: a split of `entities`, `forgetPP_N` with PP percent of the people and N the number of the draw.

        Raises:
            ValueError: for an unknown split, or a testbed that has none.
        """
        splits = self.manifest.get("splits", {})
        if name not in splits:
            near = get_close_matches(name, splits, n=1)
            there = f"there are {', '.join(splits)}" if splits else "entities has some, this testbed has none"
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"testbed {self.name} has no split {name!r}; {there}.{hint}")
        split = splits[name]
        return replace(
            self,
            datasets={stream: str(self.folder / path) for stream, path in split["datasets"].items()},
            tasks=_placed(split["tasks"], self.folder),
            manifest={**self.manifest, "num_rows": split["num_rows"]},
        )

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Testbed:
        """Read a built testbed from its folder."""
        folder = Path(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        optional = {name: str(folder / name) for name in ("oracle", "instruct") if (folder / name).is_dir()}
        return cls(
            name=manifest["name"],
            model_path=str(folder / "model"),
            oracle_path=optional.get("oracle"),
            instruct_path=optional.get("instruct"),
            datasets={stream: str(folder / path) for stream, path in manifest["datasets"].items()},
            tasks=_placed(manifest["tasks"], folder),
            instruct_tasks=_placed(manifest.get("instruct_tasks", []), folder),
            manifest=manifest,
        )


def _placed(specs: Sequence[str], folder: Path) -> list[str]:
    """Task specs of a manifest, their paths made whole."""
    return [f"{task}={folder / path}" for task, path in (spec.split("=", 1) for spec in specs)]


def build(
    name: str,
    cache_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    recipe: Recipe | None = None,
    seed: int | None = None,
) -> Testbed:
    """Build a testbed, or take it from the cache.

    Args:
        name: `llava` (tiny LLaVA and pictures, two to three minutes on two cores), `qwen2vl`, `blip2`, `minigpt4` (the
            same world, tiny models of these families; Qwen2-VL needs torchvision), `llama` (tiny Llama, the same scenes
            in words), `traits` (tiny Llama and invented stereotypes in StereoSet's shape, two to three minutes),
            `stereoset` (a small Llama into which StereoSet's stereotypes were trained) or `entities` (tiny LLaVA that
            knows made-up people by face and by name, four to five minutes).
        cache_dir: where to keep it; by default $BIASUNLEARN_CACHE or ~/.cache/biasunlearn.
        data_dir: folder of the open data sets, for `stereoset`; by default $BIASUNLEARN_DATA.
        recipe: another recipe than the default one; it gets a cache folder of its own.
        seed: another seed than the recipe's, for another world and other weights; None leaves the recipe's.

    Raises:
        ValueError: for an unknown name, or a recipe of another testbed.
        FileNotFoundError: where `stereoset` finds no data. They are needed for a cached one too: what lies in the cache
            is what was built from these very files.
    """
    recipe = _check(name, recipe)
    if seed is not None:
        recipe = replace(recipe, seed=seed)
    builder, data_sha256 = _builder(recipe, data_dir)
    folder = cache_home(cache_dir) / "testbeds" / recipe_key(recipe, data_sha256)

    def fill(target: Path) -> None:
        started = time.monotonic()
        parts = builder(target)
        manifest = {
            "name": name,
            "format_version": FORMAT_VERSION,
            "recipe": asdict(recipe),
            "versions": {"python": platform.python_version(), **{package: version(package) for package in _PACKAGES}},
            **parts,
            "seconds": round(time.monotonic() - started, 1),
        }
        (target / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    return Testbed.load(build_once(folder, fill))


def _check(name: str, recipe: Recipe | None) -> Recipe:
    if name not in RECIPES:
        near = get_close_matches(str(name), RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"Unknown testbed {name!r}; there are {', '.join(RECIPES)}.{hint}")
    if recipe is not None and recipe.name != name:
        raise ValueError(f"The recipe is for the testbed {recipe.name!r}, not for {name!r}. Pass name={recipe.name!r}.")
    return recipe or RECIPES[name]


def _builder(
    recipe: Recipe, data_dir: str | os.PathLike | None
) -> tuple[Callable[[Path], dict[str, Any]], dict[str, str]]:
    """What fills a folder, and the digests of the data files that it reads."""
    if isinstance(recipe, StereoSetRecipe):
        from biasunlearn_trainer.testbed.stereoset_files import digest_data, find_stereoset

        data = find_stereoset(recipe, data_dir)
        return lambda target: _fill(recipe, target, data), digest_data(recipe, data)
    return lambda target: _fill(recipe, target), {}


def _fill(recipe: Recipe, target: Path, data: Path | None = None) -> dict[str, Any]:
    # Imported here, so that taking a built testbed from the cache does not load torch.
    if isinstance(recipe, StereoSetRecipe):
        from biasunlearn_trainer.testbed.planted_stereoset import build_stereoset

        return build_stereoset(recipe, data, target)
    if isinstance(recipe, TraitsRecipe):
        from biasunlearn_trainer.testbed.planted_traits import build_traits

        return build_traits(recipe, target)
    if isinstance(recipe, EntitiesRecipe):
        from biasunlearn_trainer.testbed.planted_entities import build_entities

        return build_entities(recipe, target)
    from biasunlearn_trainer.testbed.planted_world import build_world

    return build_world(recipe, target)


def describe(testbed: Testbed) -> Sequence[str]:
    """The testbed in lines for a terminal: where it lies and what its models answer right."""
    lines = [f"model    {testbed.model_path}"]
    if testbed.oracle_path:
        lines.append(f"oracle   {testbed.oracle_path}")
    if testbed.instruct_path:
        lines.append(f"instruct {testbed.instruct_path}")
    if splits := testbed.manifest.get("splits"):
        lines.append(f"splits   {', '.join(splits)}; shown is {testbed.manifest['default_split']}")
    lines += [
        f"{stream:8} {path}  ({testbed.manifest['num_rows'][stream]} rows)" for stream, path in testbed.datasets.items()
    ]
    lines += [f"task     {task}" for task in (*testbed.tasks, *testbed.instruct_tasks)]
    width = max(map(len, testbed.manifest["figures"]))
    for which, figures in testbed.manifest["figures"].items():
        lines.append(f"{which:{width}} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return [*lines, f"built in {testbed.manifest['seconds']} s"]
