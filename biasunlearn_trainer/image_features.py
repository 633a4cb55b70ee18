"""What frozen image encoders make of pictures, computed once per picture and kept on disk.

Where the vision tower and the connector are frozen, a picture's features never change, and each further epoch can read
them instead of running the tower. A picture is known by what the processor made of it: another processor, or an
augmentation that draws anew, makes another picture, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.blip_2.modeling_blip_2 import BaseModelOutputWithVisionQformerOutputs

from biasunlearn_trainer.completions import unwrap
from biasunlearn_trainer.fingerprints import config_fingerprint, weights_hash
from biasunlearn_trainer.kept_files import checksum, digest_of, misfit, nearest
from biasunlearn_trainer.models import evaluating, group_of, module_groups

logger = logging.getLogger(__name__)

KIND = "image features"


class ImageFeatures:
    """Features by picture, in files that only grow: one of values and one that says where each picture's begin.

    Args:
        model: an image-text model, inside PEFT or not.
        folder: where files are kept; a subfolder of it belongs to these weights.
        groups: what `module_groups` is to take instead of what it finds.

    Raises:
        ValueError: the model has no image encoder, takes no features from outside, or trains the encoder.
    """

    def __init__(self, model: nn.Module, folder: Path, groups: dict[str, Any] | None = None):
        model = unwrap(model)
        name = type(model).__name__
        if "mm_encoder_outputs" not in inspect.signature(type(model).forward).parameters:
            raise ValueError(f"cache_image_features: {name} takes no image features from outside; leave it out.")
        parts = module_groups(model, groups)
        frozen = {n: p for n, p in model.named_parameters() if group_of(n, parts) in ("vision_tower", "connector")}
        trained = [n for n, p in frozen.items() if p.requires_grad]
        if trained:
            raise ValueError(
                f"cache_image_features needs a frozen vision tower and connector; {len(trained)} of their weights are "
                f"trained, the first: {trained[0]}. Set trainable_groups to [language_model], or leave it out."
            )
        self._folder = folder
        weights = weights_hash(sorted(frozen.items()))
        self._parts = {"encoder weights": weights, "model settings": config_fingerprint(model)}
        self._places: dict[str, list[dict[str, Any]]] = {}  # two runs may have kept one picture
        self._whole: set[str] = set()  # whose checksum was looked at
        self._opened: Path | None = None
        self._precision = ""
        self._file = f"{uuid.uuid4().hex}.bin"
        self._is_full = False

    def replaced(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Any]:
        """A collated batch with its pictures' features in place of `pixel_values`; computed where they are not kept."""
        if "pixel_values" not in batch:
            return batch
        model, device = unwrap(model), batch["pixel_values"].device
        self._open(device.type)
        pictures = _pictures(batch)
        keys = [_picture_key(*picture) for picture in pictures]
        features = {key: found for key in keys if (found := self._read(key)) is not None}
        missing = {key: picture for key, picture in zip(keys, pictures, strict=True) if key not in features}
        if missing:
            for key, found in zip(missing, _computed(model, list(missing.values())), strict=True):
                features[key] = found
                self._append(key, found)
        values = [features[key].to(device) for key in keys]
        rest = {name: value for name, value in batch.items() if name != "pixel_values"}
        return rest | {"mm_encoder_outputs": {"image": _as_output(model, values)}}

    def _open(self, device: str) -> None:
        """Reads where every process that ever wrote for these weights left its pictures."""
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else "own"
        if str(precision) == self._precision:
            return
        self._precision = str(precision)
        parts = self._parts | {"precision": self._precision.removeprefix("torch.")}
        folder = self._folder / digest_of(KIND, parts)
        self._opened, self._places, self._whole = folder, {}, set()
        self._made_of = {"kind": KIND, "parts": json.dumps(parts)}
        for index in sorted(folder.glob("*.jsonl")):
            head, *lines = index.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            if fault := self._fault(head, parts):
                logger.warning("Image features: %s is not read, %s. Made anew.", index, fault)
                continue
            for line in lines:
                try:
                    entry = json.loads(line)
                    self._places.setdefault(entry["picture"], []).append(
                        entry | {"file": str(index.with_suffix(".bin"))}
                    )
                except (ValueError, KeyError, TypeError):
                    continue  # a run ended while it wrote the line
        if self._places:
            logger.info("Features of %d pictures: %s", len(self._places), folder)
        elif found := nearest(self._others(), parts):
            logger.warning("Image features: those in %s were made with %s. Made anew.", *found)

    @staticmethod
    def _fault(head: str, parts: dict[str, str]) -> str | None:
        try:
            return misfit(json.loads(head), KIND, parts)
        except (ValueError, KeyError, AttributeError):
            return "it is damaged"

    def _others(self) -> Iterator[tuple[Path, dict[str, str] | None]]:
        """Folders of other weights, with what they were made of."""
        for folder in self._folder.glob("*"):
            index = next(folder.glob("*.jsonl"), None)
            try:
                with index.open(encoding="utf-8") as file:
                    yield folder, json.loads(json.loads(file.readline())["parts"])
            except (AttributeError, OSError, ValueError, KeyError):
                continue  # an empty folder, or one that a run has just begun

    def _read(self, key: str) -> Tensor | None:
        """A picture's features, memory-mapped; None where they are not there, or damaged, which is said."""
        places = self._places.get(key, [])
        while places:
            try:
                values = _mapped(places[-1])
                if key not in self._whole and checksum(values) != places[-1]["checksum"]:
                    raise OSError("another checksum than when written")
                self._whole.add(key)
                return values
            except (OSError, RuntimeError) as err:
                logger.warning("Image features: %s is damaged (%s). Made anew.", places[-1]["file"], err)
                places.pop()
        return None

    def _append(self, key: str, values: Tensor) -> None:
        """Keeps a picture's features; a disk without room is said once, and pictures are computed again from then."""
        if self._is_full:
            return
        data = self._opened / self._file
        try:
            data.parent.mkdir(parents=True, exist_ok=True)
            with data.open("ab") as file:
                start = file.tell() // values.dtype.itemsize
                file.write(values.contiguous().cpu().view(torch.uint8).numpy().data)
            name = str(values.dtype).removeprefix("torch.")
            entry = {"picture": key, "start": start, "shape": list(values.shape), "dtype": name}
            entry["checksum"] = checksum(values)
            index = data.with_suffix(".jsonl")
            head = "" if index.exists() else json.dumps(self._made_of) + "\n"
            with index.open("a", encoding="utf-8") as file:
                file.write(head + json.dumps(entry) + "\n")
        except OSError as err:
            logger.warning("Image features are not kept any more (%s); pictures are computed at every step.", err)
            self._is_full = True
            return
        self._whole.add(key)
        self._places.setdefault(key, []).append(entry | {"file": str(data)})


def _mapped(place: dict[str, Any]) -> Tensor:
    """What lies at a place of a file."""
    end, dtype = place["start"] + math.prod(place["shape"]), getattr(torch, place["dtype"])
    if os.stat(place["file"]).st_size < end * dtype.itemsize:
        raise OSError("it is cut off")
    values = torch.from_file(place["file"], shared=False, size=end, dtype=dtype)
    return values[place["start"] :].view(place["shape"])


def _pictures(batch: dict[str, Tensor]) -> list[tuple[Tensor, Tensor | None]]:
    """Each picture's pixels, and its grid where the pixels of all stand one behind the other (Qwen2-VL)."""
    grids = batch.get("image_grid_thw")
    if grids is None:
        return [(pixels[None], None) for pixels in batch["pixel_values"]]
    parts = batch["pixel_values"].split(grids.prod(-1).tolist())
    return [(pixels, grid[None]) for pixels, grid in zip(parts, grids, strict=True)]


def _picture_key(pixels: Tensor, grid: Tensor | None) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{tuple(pixels.shape)} {pixels.dtype} {None if grid is None else grid.tolist()}".encode())
    digest.update(pixels.detach().contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _computed(model: nn.Module, pictures: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
    """(tokens, D) of each picture, each by itself: to the last bit the same, whatever is missing beside it."""
    found = []
    with evaluating(model):
        for pixels, grid in pictures:
            extra = {} if grid is None else {"image_grid_thw": grid}
            found += list(model.get_image_features(pixels, **extra, return_dict=True).pooler_output)
    return found


def _as_output(model: nn.Module, features: list[Tensor]) -> Any:
    """Features as the model's own encoder returns them."""
    if hasattr(model, "qformer"):
        return BaseModelOutputWithVisionQformerOutputs(pooler_output=torch.stack(features))
    return BaseModelOutputWithPooling(pooler_output=tuple(features))
