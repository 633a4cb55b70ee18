"""What a run changed: its weights minus those it began with, read from disk a piece at a time.

    changes = changes_of("outputs/mmunlearner", "llava-hf/llava-1.5-7b-hf")
    most_changed(changes, changes.places, num=1_000_000)

Of a run with a LoRA adapter the change of a weight is scale * B A, as PEFT merges it; the base is not read then.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from biasunlearn_trainer.models import ADAPTER_FILE, load_config, model_class
from biasunlearn_trainer.saliency.places import PEFT_PREFIX, Places
from biasunlearn_trainer.saliency.ranking import AT_ONCE
from biasunlearn_trainer.transfer import INITS_THAT_KEEP_THE_BASE, Adapter, find_adapter

WEIGHTS_FILE, INDEX_FILE, CONFIG_FILE = "model.safetensors", "model.safetensors.index.json", "config.json"
SAVED_PART = ".modules_to_save.default"
NAMES_SHOWN = 5


def changes_of(
    run: str,
    base: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> WholeChanges | AdapterChanges:
    """What a run changed.

    Args:
        run: folder of a finished run: a whole model, or an adapter.
        base: the model that it began with, a folder or a Hub id.
        revision: the base's branch, tag or commit on the Hub.
        trust_remote_code: run modelling code that comes with the base. Off unless asked for.
        groups: what `module_groups` is to take instead of what it finds.

    Returns:
        What goes through (name, change) when it is called, any number of times; `places` are those of the base.

    Raises:
        OSError: there are no weights in one of the two.
        ValueError: the two are not of one model, or what the run changed cannot be told from its files.
    """
    folder = _base_folder(base, revision)
    if (folder / ADAPTER_FILE).is_file():
        raise ValueError(f"{base} is an adapter itself; changes are measured from a whole model. Merge it first.")
    with init_empty_weights():
        config = load_config(str(folder), trust_remote_code=trust_remote_code)
        model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    if (Path(run) / ADAPTER_FILE).is_file():
        return AdapterChanges(find_adapter(str(run)), StoredWeights(folder, model), model, Places(model, groups))
    return WholeChanges(StoredWeights(Path(run), model), StoredWeights(folder, model), Places(model, groups))


def _base_folder(base: str, revision: str | None) -> Path:
    if Path(base).is_dir():
        return Path(base)
    # Not every file that ends in .safetensors: repositories also keep the same weights in other layouts.
    wanted = [CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE, "model-*.safetensors", "*.py"]
    return Path(snapshot_download(base, revision=revision, allow_patterns=wanted))


class StoredWeights:
    """A model's weights on disk, in one file or several, by the names that the model has for them.

    Args:
        folder: with safetensors as `save_pretrained` writes them.
        model: its weights are not looked at; it may be on `meta`.

    Raises:
        OSError: where the folder holds no such files.
        ValueError: where weights of the model are not in them.
    """

    def __init__(self, folder: Path, model: PreTrainedModel):
        self.folder = folder
        own = model.state_dict()
        conversions = get_model_conversion_mapping(model)
        renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
        self._files: dict[str, Path] = {}
        self.owners: dict[str, str] = {}
        parameters = dict(model.named_parameters())
        for key, file in self._keys().items():
            name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, own)
            if name in parameters:
                self._files[key], self.owners[key] = file, name
        missing = sorted(parameters.keys() - set(self.owners.values()))
        if missing:
            raise ValueError(f"{folder} lacks weights of the model: {_listed(missing)}.")
        self._open: dict[Path, safe_open] = {}

    def _keys(self) -> dict[str, Path]:
        """The file of each tensor."""
        index = self.folder / INDEX_FILE
        if index.is_file():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            for name in set(names.values()):
                if Path(name).name != name:
                    raise ValueError(f"{index} names {name!r}, which leads out of its folder.")
            return {key: self.folder / name for key, name in names.items()}
        if not (self.folder / WEIGHTS_FILE).is_file():
            raise OSError(f"{self.folder} holds neither {WEIGHTS_FILE} nor {ADAPTER_FILE}; expected a saved model.")
        with safe_open(self.folder / WEIGHTS_FILE, "pt") as file:
            return dict.fromkeys(file.keys(), self.folder / WEIGHTS_FILE)

    def _file(self, key: str) -> safe_open:
        path = self._files[key]
        if path not in self._open:
            self._open[path] = safe_open(path, "pt")
        return self._open[path]

    def shape(self, key: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self._file(key).get_slice(key).get_shape())

    def rows(self, key: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor in blocks of about a million weights, each with the number of its first row."""
        shape = self.shape(key)
        if len(shape) < 2:
            yield 0, self._file(key).get_tensor(key)
            return
        step = max(1, AT_ONCE * shape[0] // max(1, torch.Size(shape).numel()))
        for start in range(0, shape[0], step):
            yield start, self._file(key).get_slice(key)[start : start + step]


class WholeChanges:
    """The change of every weight between two models on disk.

    Args:
        after: the run's weights.
        before: those it began with.
        places: of their weights.

    Raises:
        ValueError: where the two have weights of other names or shapes.
    """

    def __init__(self, after: StoredWeights, before: StoredWeights, places: Places):
        self.after, self.before, self.places = after, before, places
        if after.owners.keys() == before.owners.keys():
            self._pairs = {key: key for key in after.owners}
        else:  # the same model saved under published names and under its own
            theirs = {name: key for key, name in before.owners.items()}
            self._pairs = {key: theirs[name] for key, name in after.owners.items()}
        faults = [
            f"{key} is {after.shape(key)}, in {before.folder} {before.shape(other)}"
            for key, other in self._pairs.items()
            if after.shape(key) != before.shape(other)
        ]
        if faults or len(set(self._pairs.values())) < len(before.owners):
            shown = "; ".join(faults[:NAMES_SHOWN]) or "their files do not hold the same tensors"
            raise ValueError(f"{after.folder} was not trained from {before.folder}: {shown}.")

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        """Weights' names and changes in float32, a large weight in several pieces."""
        for key, other in self._pairs.items():
            for (_, after), (_, before) in zip(self.after.rows(key), self.before.rows(other), strict=True):
                yield self.after.owners[key], after.float() - before.float()


class AdapterChanges:
    """The change of every weight below a LoRA adapter: scale * B A; of a module trained whole, its change.

    Args:
        adapter: what `find_adapter` returned.
        before: the base's weights.
        model: the base's architecture, on `meta`; changed.
        places: of the base's weights.

    Raises:
        ValueError: where what the adapter does is not such a sum, or it does not fit the model.
    """

    def __init__(self, adapter: Adapter, before: StoredWeights, model: PreTrainedModel, places: Places):
        faults = list(_not_a_sum(adapter))
        if faults:
            raise ValueError(f"What {adapter.source} changed cannot be told: {'; '.join(faults)}.")
        self.before, self.places = before, places
        config = copy.deepcopy(adapter.config)
        config.init_lora_weights = True  # the others read the base's weights
        with init_empty_weights():
            self._model = get_peft_model(model, config)
        own = self._model.state_dict()
        placed = get_peft_model_state_dict(self._model, own, save_embedding_layers=False)
        # PEFT saves an adapted embedding with the frozen weights below its adapter.
        strays = sorted({name for name in adapter.shapes if ".base_layer." not in name} ^ placed.keys())
        if strays:
            raise ValueError(f"{adapter.source} does not fit the model {before.folder}: {_listed(strays)}.")
        # PEFT's own loader would move the adapter to where the base is, which is nowhere.
        names = {id(tensor): name for name, tensor in own.items()}
        tensors = load_file(adapter.folder / SAFETENSORS_WEIGHTS_NAME)
        there = {names[id(place)]: tensors[name] for name, place in placed.items()}
        self._model.load_state_dict(there, strict=False, assign=True)
        self._keys = {name: key for key, name in before.owners.items()}
        tied = sorted(own for own, _ in self._saved() if own not in self._keys)
        if tied:
            raise ValueError(
                f"{adapter.source} trained {_listed(tied)} apart from the weights that they are in the model, so that "
                "no change can be told."
            )

    def _saved(self) -> Iterator[tuple[str, Tensor]]:
        """The weights of modules that were trained whole, by the names that they have in the base."""
        for name, after in self._model.named_parameters():
            if SAVED_PART in name:
                yield name.replace(SAVED_PART, "").removeprefix(PEFT_PREFIX), after.detach()

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        """Weights' names and changes in float32, a large weight in several pieces."""
        for name, module in self._model.named_modules():
            if isinstance(module, LoraLayer) and "default" in (*module.lora_A, *module.lora_embedding_A):
                with torch.no_grad():
                    yield f"{name.removeprefix(PEFT_PREFIX)}.weight", module.float().get_delta_weight("default")
        for name, after in self._saved():
            for start, before in self.before.rows(self._keys[name]):
                yield name, after[start : start + len(before)].float() - before.float()


def _not_a_sum(adapter: Adapter) -> Iterator[str]:
    """What makes an adapter more than base + scale * B A."""
    config = adapter.config
    if config.peft_type.value != "LORA":
        yield f"it is of type {config.peft_type.value}, expected LORA"
        return
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower() not in INITS_THAT_KEEP_THE_BASE:
        yield f"it was begun with init_lora_weights={init!r}, which also changed the weights below it"
    if config.use_dora:
        yield "DoRA also scales the weights below it"
    if config.bias != "none" or config.lora_bias:
        yield "it trained biases, which it does not say apart"
    if config.target_parameters:
        yield "it is on single parameters (`target_parameters`)"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
