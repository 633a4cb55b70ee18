"""Adapters by name: whether a folder or a Hub id holds one, what it was trained on, and putting it there."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers import PreTrainedModel
from transformers.utils import cached_file

from biasunlearn_trainer.run_files import RESULTS_FILE

ADAPTER_FILE = "adapter_config.json"
PROCESSOR_CONFIGS = ("tokenizer_config.json", "processor_config.json")


def stored_file(name_or_path: str, filename: str, revision: str | None = None) -> Path | None:
    """A file of a folder, or of a repository on the Hub, from where it is downloaded unless the cache has it.

    Args:
        name_or_path: a folder or a Hub id.
        filename: of the file in it.
        revision: branch, tag or commit on the Hub.

    Returns:
        Where it lies; None where there is no such file or repository, or the Hub cannot be reached and the cache has
        none. Whoever loads what is named says which.
    """
    if Path(name_or_path).is_dir():
        path = Path(name_or_path) / filename
        return path if path.is_file() else None
    try:
        found = cached_file(
            name_or_path,
            filename,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError:
        return None
    return None if found is None else Path(found)


def adapter_config(name_or_path: str, revision: str | None = None) -> PeftConfig | None:
    """The configuration of an adapter; None where the folder or the repository holds none.

    Args:
        name_or_path: a folder or a Hub id.
        revision: branch, tag or commit on the Hub.
    """
    found = stored_file(name_or_path, ADAPTER_FILE, revision)
    return None if found is None else PeftConfig.from_pretrained(str(found.parent))


def base_of(config: PeftConfig, name_or_path: str, revision: str | None = None) -> tuple[str, str | None]:
    """The model that an adapter was trained on, and that model's revision.

    Args:
        config: what `adapter_config` returned.
        name_or_path: the adapter.
        revision: what was asked for: the adapter's on the Hub, and of a folder, which has none, the base's.

    Raises:
        OSError: the adapter does not say.
    """
    if not config.base_model_name_or_path:
        raise OSError(
            f"{name_or_path} is an adapter whose {ADAPTER_FILE} names no base model: it was trained on one that lay "
            "on a disk. Load that model yourself and put the adapter on it (`PeftModel.from_pretrained(base, ID)`), or "
            "publish the adapter again with `--base_model ID`."
        )
    asked = revision if Path(name_or_path).is_dir() else None
    return config.base_model_name_or_path, asked or config.revision


def processor_folder(name_or_path: str, revision: str | None = None) -> str | None:
    """The folder with an adapter's own processor or tokenizer, downloaded where need be; None where it has none.

    Transformers loads these from a folder without a `config.json`, but not from such a repository when it is offline.
    """
    if not any(stored_file(name_or_path, name, revision) for name in PROCESSOR_CONFIGS):
        return None
    if Path(name_or_path).is_dir():
        return name_or_path
    wanted = ["*.json", "*.jinja", "*.txt", "*.model"]
    return snapshot_download(name_or_path, revision=revision, allow_patterns=wanted, ignore_patterns=RESULTS_FILE)


def put_on(base: PreTrainedModel, name_or_path: str, revision: str | None = None) -> PeftModel:
    """The adapter on its base, trainable: unlearning may go on from it.

    Raises:
        OSError: the adapter has no weights in safetensors.
    """
    weights = stored_file(name_or_path, SAFETENSORS_WEIGHTS_NAME, revision)
    if weights is None:
        raise OSError(
            f"{name_or_path} holds no {SAFETENSORS_WEIGHTS_NAME}; adapters are read from safetensors only. (From the "
            "Hub: or it could not be downloaded.)"
        )
    return PeftModel.from_pretrained(base, str(weights.parent), is_trainable=True)
