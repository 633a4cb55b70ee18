"""An adapter merged into its base: one model that loads without peft."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.hub.contents import MODEL_CONFIGS, PROCESSOR_FILES
from biasunlearn_trainer.hub.finished import FinishedRun, PublishError, read_run, weight_files
from biasunlearn_trainer.models import load_config, load_model
from biasunlearn_trainer.transfer import check_transfer, find_adapter, put_adapter

logger = logging.getLogger(__name__)


def merge(run_dir: str | Path, output: str | Path, trust_remote_code: bool = False) -> Path:
    """Writes the whole model of a run: base and adapter in one, or, after full fine-tuning, a plain copy.

    The weights have the precision that the run measured the model in. With a base in 4 or 8 bits, the adapter goes into
    the dequantised weights: those that it was trained on and measured with, not the original ones.

    Args:
        run_dir: the run's folder.
        output: a new or empty folder.
        trust_remote_code: run modelling code that comes with the base. Off unless asked for.

    Returns:
        The folder, which loads with plain transformers.

    Raises:
        PublishError: the run is not finished, or the base is not there, is another one, or does not fit the adapter.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise PublishError(f"{output} exists and is not empty. Name a new folder.")
    run = read_run(run_dir, needs_results=False)
    if run.is_adapter:
        model = _merged(run, trust_remote_code)
        model.save_pretrained(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        names = [name for name in MODEL_CONFIGS if (run.folder / name).is_file()]
        for path in [*weight_files(run.folder), *(run.folder / name for name in names)]:
            shutil.copyfile(path, output / path.name)
    for name in PROCESSOR_FILES:
        if (run.folder / name).is_file():
            shutil.copyfile(run.folder / name, output / name)
    return output


def _merged(run: FinishedRun, trust_remote_code: bool) -> torch.nn.Module:
    base, revision = run.base, run.adapter_config.get("revision")
    if not base:
        raise PublishError(f"{run.folder}: adapter_config.json names no base model. Set base_model_name_or_path there.")
    try:
        adapter = find_adapter(str(run.folder))
        check_transfer(adapter, load_config(base, revision, trust_remote_code), base, trust_remote_code)
        model = _base(run, base, revision, trust_remote_code)
        return put_adapter(model, adapter, base, revision).merge_and_unload(safe_merge=True)
    except (OSError, ValueError, ImportError) as err:
        raise PublishError(f"{run.folder} cannot be merged into {base}: {err}") from err


def _base(run: FinishedRun, base: str, revision: str | None, trust_remote_code: bool) -> torch.nn.Module:
    """The base with the weights that the adapter was trained on; their fingerprint tells, unless they are quantised."""
    options: dict[str, Any] = {"dtype": run.recipe.get("dtype") or "float32", "trust_remote_code": trust_remote_code}
    if run.is_quantised:
        logger.warning("The adapter was trained on a quantised base; it is merged into the dequantised weights.")
        model = load_model(base, revision=revision, quantization_config=_quantisation(run.recipe), **options)
        return model.dequantize()
    model = load_model(base, revision=revision, **options)
    expected = run.environment.get("model", {})
    if expected.get("source") == base and expected.get("fingerprint") not in (None, model_hash(model)):
        raise ValueError(
            f"its weights are not those that the run began with (fingerprint {model_hash(model)}, expected "
            f"{expected['fingerprint']}). Get the base of that day, or run the recipe again."
        )
    return model


def _quantisation(recipe: Mapping[str, Any]) -> Any:
    from trl import ModelConfig, get_quantization_config

    keys = ModelConfig.__dataclass_fields__.keys() & recipe.keys()
    return get_quantization_config(ModelConfig(**{key: recipe[key] for key in keys}))
