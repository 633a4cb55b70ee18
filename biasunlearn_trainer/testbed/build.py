"""From a recipe to a folder with models, data sets and a manifest."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

from biasunlearn_trainer.cache import cache_home
from biasunlearn_trainer.testbed.cache import MANIFEST, build_once
from biasunlearn_trainer.testbed.recipe import FORMAT_VERSION, Recipe, StereoSetRecipe, WorldRecipe, recipe_key

RECIPES: dict[str, Recipe] = {
    "llava": WorldRecipe(),
    "llama": WorldRecipe(name="llama", steps=600),  # words are learned sooner than pictures
    "stereoset": StereoSetRecipe(),
}
_PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "pillow")


@dataclass(frozen=True)
class Testbed:
    """A built testbed.

    Attributes:
        name: `llava`, `llama` or `stereoset`.
        model_path: the planted model with its processor or tokenizer, a folder for `load_model` and `load_processor`.
        oracle_path: its unbiased twin, in the same layout; None where the truth is not known.
        datasets: folder of each training stream: `forget`, `retain`, and `preferred` where there is one.
        tasks: specs of the evaluation tasks, `NAME[@LABEL]=PATH`.
        manifest: recipe, versions, row counts and what the models answer right.
    """

    __test__ = False  # keeps pytest from collecting it for its name

    name: str
    model_path: str
    oracle_path: str | None
    datasets: dict[str, str]
    tasks: list[str]
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Testbed:
        """Read a built testbed from its folder."""
        folder = Path(folder)
        manifest = json.loads((folder / MANIFEST).read_text())
        tasks = [task.split("=", 1) for task in manifest["tasks"]]
        return cls(
            name=manifest["name"],
            model_path=str(folder / "model"),
            oracle_path=str(folder / "oracle") if (folder / "oracle").is_dir() else None,
            datasets={stream: str(folder / path) for stream, path in manifest["datasets"].items()},
            tasks=[f"{task}={folder / path}" for task, path in tasks],
            manifest=manifest,
        )


def build(
    name: str,
    cache_dir: str | os.PathLike | None = None,
    data_dir: str | os.PathLike | None = None,
    recipe: Recipe | None = None,
) -> Testbed:
    """Build a testbed, or take it from the cache.

    Args:
        name: `llava` (tiny LLaVA and pictures, two to three minutes on two cores), `llama` (tiny Llama, the same scenes
            in words) or `stereoset` (a small Llama into which StereoSet's stereotypes were trained).
        cache_dir: where to keep it; by default $BIASUNLEARN_CACHE or ~/.cache/biasunlearn.
        data_dir: folder of the open data sets, for `stereoset`; by default $BIASUNLEARN_DATA.
        recipe: another recipe than the default one; it gets a cache folder of its own.

    Raises:
        ValueError: for an unknown name, or a recipe of another testbed.
        FileNotFoundError: where `stereoset` finds no data.
    """
    recipe = _check(name, recipe)
    folder = cache_home(cache_dir) / "testbeds" / recipe_key(recipe)

    def fill(target: Path) -> None:
        started = time.monotonic()
        parts = _builder(recipe, data_dir)(target)
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


def _builder(recipe: Recipe, data_dir: str | os.PathLike | None) -> Callable[[Path], dict[str, Any]]:
    # Imported here, so that naming a testbed does not load torch.
    if isinstance(recipe, WorldRecipe):
        from biasunlearn_trainer.testbed.planted_world import build_world

        return lambda target: build_world(recipe, target)
    from biasunlearn_trainer.testbed.planted_stereoset import build_stereoset, find_stereoset

    data = find_stereoset(data_dir)
    return lambda target: build_stereoset(recipe, data, target)


def describe(testbed: Testbed) -> Sequence[str]:
    """The testbed in lines for a terminal: where it lies and what its models answer right."""
    lines = [f"model    {testbed.model_path}"]
    if testbed.oracle_path:
        lines.append(f"oracle   {testbed.oracle_path}")
    lines += [
        f"{stream:8} {path}  ({testbed.manifest['num_rows'][stream]} rows)" for stream, path in testbed.datasets.items()
    ]
    lines += [f"task     {task}" for task in testbed.tasks]
    for which, figures in testbed.manifest["figures"].items():
        lines.append(f"{which:8} " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    return [*lines, f"built in {testbed.manifest['seconds']} s"]
