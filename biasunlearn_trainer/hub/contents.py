"""What is published of a run: file by file, nothing that is pickled, nothing that names this machine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from biasunlearn_trainer.hub.finished import FinishedRun, weight_files
from biasunlearn_trainer.hub.naming import is_hub_id, portable, public_name, without_paths
from biasunlearn_trainer.hub.shared_recipe import recipe_for_others
from biasunlearn_trainer.models import ADAPTER_FILE
from biasunlearn_trainer.run_files import FIGURE_FILE, RESOLVED_FILE, RESULTS_FILE

CARD = "README.md"
MODEL_CONFIGS = ("config.json", "generation_config.json")
PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "image_processor_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What tokenizers and processors of transformers save; a list, so that no other file slips in."""
CONFIG_PATHS = ("_name_or_path", "name_or_path")

Contents = dict[str, Path | bytes]


def contents_of(run: FinishedRun, card: str, base_model: str | None = None, weights: Path | None = None) -> Contents:
    """The files to publish, by their name on the Hub: a path here, or the bytes where the file here says too much.

    Args:
        run: what `read_run` returned.
        card: the text of the model card.
        base_model: the base's Hub id, where the run read it from somewhere else.
        weights: a folder with the merged model, in place of the run's own weights.
    """
    weights = weights or run.folder
    files: Contents = {CARD: card.encode()}
    files |= {path.name: path for path in weight_files(weights)}
    if ADAPTER_FILE not in files and (weights / ADAPTER_FILE).is_file() and weights == run.folder and run.is_adapter:
        files[ADAPTER_FILE] = _adapter_config(run, base_model)
    else:
        files |= {name: _config(weights / name) for name in MODEL_CONFIGS if (weights / name).is_file()}
    files |= {name: _config(run.folder / name) for name in PROCESSOR_FILES if (run.folder / name).is_file()}
    if run.recipe_text:
        files[RESOLVED_FILE] = recipe_for_others(run).encode()
    if run.results:
        named = {
            state: {**result.to_dict(), "model": _model(run, result.model)} for state, result in run.results.items()
        }
        files[RESULTS_FILE] = (json.dumps(named, indent=2, ensure_ascii=False) + "\n").encode()
        if (run.folder / FIGURE_FILE).is_file():
            files[FIGURE_FILE] = run.folder / FIGURE_FILE
    return files


def write_contents(files: Mapping[str, Path | bytes], folder: str | Path) -> Path:
    """Writes what would be sent into a folder that is new or empty.

    Raises:
        FileExistsError: the folder holds something.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty. Name a new folder.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        else:
            shutil.copyfile(content, folder / name)
    return folder


def _adapter_config(run: FinishedRun, base_model: str | None) -> bytes:
    """The adapter's configuration with its base by Hub id, or none: a path would mislead whoever has not this disk."""
    base = base_model or run.base
    config = {**run.adapter_config, "base_model_name_or_path": base if is_hub_id(base) else None}
    return (json.dumps(portable(config), indent=2, sort_keys=True) + "\n").encode()


def _config(path: Path) -> Path | bytes:
    """A configuration as it is, or without the paths that transformers may note in it."""
    if path.suffix != ".json" or path.name in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return path
    config = json.loads(path.read_text(encoding="utf-8"))
    cleaned = {
        key: public_name(value) if key in CONFIG_PATHS and isinstance(value, str) else value
        for key, value in config.items()
    }
    return path if cleaned == config else (json.dumps(cleaned, indent=2, ensure_ascii=False) + "\n").encode()


def _model(run: FinishedRun, source: str) -> str:
    if source in (str(run.folder), run.recipe.get("output_dir")):
        return "this model"
    return without_paths(public_name(source) or "")
