"""Short digests of what a result depends on: a model's weights, a set's rows, a processor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from biasunlearn_trainer.models import base_model, has_fresh_adapter, tokenizer_of
from biasunlearn_trainer.rows import pieces
from biasunlearn_trainer.sharding import gathered

DIGEST_BYTES = 8


def model_hash(model: nn.Module, skip_fresh_adapter: bool = True) -> str:
    """Digest of all weights, by name, shape, type and content; where they are sharded, every process has to call it.

    Args:
        model: inside PEFT or not.
        skip_fresh_adapter: leave a LoRA adapter out that changes nothing yet: under it a model has the digest of its
            base.
    """
    fresh = skip_fresh_adapter and has_fresh_adapter(model)
    weights = sorted(base_model(model).state_dict(keep_vars=True).items())
    return weights_hash(
        (name.replace(".base_layer", ""), value) for name, value in weights if not (fresh and "lora_" in name)
    )


def weights_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Digest of named weights in their order, by name, shape, type and content; sharded ones are gathered."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for name, tensor in weights:
        with gathered(tensor):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Of a configuration what no forward pass depends on: where it came from, and what is set on the way.
NOT_COMPUTED_WITH = {
    "_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "pad_token_id",
    "bos_token_id", "eos_token_id", "output_attentions", "output_hidden_states", "return_dict", "is_decoder",
}  # fmt: skip
ADAPTER_SETTINGS = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")


def config_fingerprint(model: nn.Module) -> str:
    """Digest of the settings that one set of weights gives other outputs with: heads, scales, an adapter's alpha.

    Args:
        model: inside PEFT or not; an adapter that changes nothing yet is left out.
    """
    parts: list[Any] = [_computed_with(base_model(model).config.to_dict())]
    if isinstance(model, PeftModel) and not has_fresh_adapter(model):
        parts += [
            {name: getattr(config, name, None) for name in ADAPTER_SETTINGS} for config in model.peft_config.values()
        ]
    said = json.dumps(parts, default=str, sort_keys=True)
    return hashlib.blake2b(said.encode(), digest_size=DIGEST_BYTES).hexdigest()


def _computed_with(settings: Any) -> Any:
    if isinstance(settings, Mapping):
        kept = {str(name): value for name, value in settings.items() if name not in NOT_COMPUTED_WITH}
        return {name: _computed_with(value) for name, value in kept.items() if not name.startswith("_")}
    return [_computed_with(value) for value in settings] if isinstance(settings, list | tuple) else settings


def rows_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Digest of what a model sees of a set: prompts, completions and images, in order.

    A picture counts by its bytes, or, where a row names a file, by the file's path, size and time of change.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    if isinstance(rows, Dataset):
        columns = [name for name in ("prompt", "completion", "images") if name in rows.column_names]
        rows = (_with_files(row) for piece in pieces(rows, columns) for row in piece.to_pylist())
    for row in rows:
        for name in ("prompt", "completion", "images"):
            _feed(digest, row.get(name))
    return digest.hexdigest()


def content_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """Digest of everything that rows hold, every column and the pictures themselves, in order."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for row in rows:
        _feed(digest, row)
    return digest.hexdigest()


def processor_fingerprint(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> str:
    """Digest of how rows become tensors: vocabulary, special tokens, chat template, image settings."""
    tokenizer = tokenizer_of(processing_class)
    image_processor = getattr(processing_class, "image_processor", None)
    parts = {
        "classes": [type(processing_class).__name__, type(tokenizer).__name__],
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": tokenizer.special_tokens_map,
        "probe": tokenizer("A probe of merges,  blanks\nand casing.")["input_ids"],
        "template": getattr(processing_class, "chat_template", None),
        "images": image_processor.to_dict() if image_processor is not None else None,
    }
    return hashlib.blake2b(json.dumps(parts, default=str).encode(), digest_size=DIGEST_BYTES).hexdigest()


def model_parts(
    model: nn.Module, processing_class: ProcessorMixin | PreTrainedTokenizerBase, weights: str | None = None
) -> dict[str, str]:
    """What a model's results depend on beside the rows, by the name that a message has for it.

    Args:
        model: inside PEFT or not.
        processing_class: its tokenizer or processor.
        weights: digest of the model's weights, where it is known.
    """
    return {
        "model weights": weights or model_hash(model),
        "model settings": config_fingerprint(model),
        "tokenizer or processor": processor_fingerprint(processing_class),
    }


def _with_files(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a set, with its pictures as {bytes, path}, also where the set names files alone."""
    images = [{"bytes": None, "path": image} if isinstance(image, str) else image for image in row.get("images") or ()]
    return {**row, "images": images} if images else row


def _feed(digest: Any, value: Any) -> None:
    """Feed one value, with its type and length, so that no two different rows run into the same bytes."""
    if isinstance(value, Mapping):
        if value.get("bytes") is None and value.get("path") and set(value) == {"bytes", "path"}:
            stat = Path(value["path"]).stat()
            value = f"{value['path']} {stat.st_size} {stat.st_mtime_ns}"
        elif set(value) == {"bytes", "path"}:
            value = value["bytes"]
        else:
            value = [part for item in sorted(value.items()) for part in item]
    if isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
        return
    if hasattr(value, "tobytes") and hasattr(value, "mode"):  # a PIL picture
        digest.update(f"{value.mode}{value.size}".encode())
        value = value.tobytes()
    data = value if isinstance(value, bytes) else str(value).encode()
    digest.update(f"{type(value).__name__}{len(data)}:".encode())
    digest.update(data)
