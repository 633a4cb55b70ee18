"""Weight transfer: an adapter trained on one model is put on its sibling, for instance on the instruct model.

    adapter = find_adapter("outputs/mistral_biasunlearn")
    check_transfer(adapter, load_config("mistralai/Mistral-7B-Instruct-v0.3"), "mistralai/Mistral-7B-Instruct-v0.3")
    model = put_adapter(load_model("mistralai/Mistral-7B-Instruct-v0.3"), adapter, "mistralai/Mistral-7B-Instruct-v0.3")

With LoRA, every target module of the sibling then computes with `W_sibling + scale * B A`, where B and A are what was
learned on the base (BiasUnlearn, arXiv 2509.25673). PEFT passes over tensors that a model has no place for and over
places without a tensor; here both are errors, found before the sibling's weights are loaded.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedConfig, PreTrainedModel

from biasunlearn_trainer.adapters import ADAPTER_FILE, adapter_config
from biasunlearn_trainer.models import load_config, model_class

logger = logging.getLogger(__name__)

SAME_IN_SIBLINGS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "hidden_act",
    "image_size",
    "patch_size",
)
"""What the configurations of two siblings share; a key that both lack counts as equal."""
INITS_THAT_KEEP_THE_BASE = ("gaussian", "eva", "orthogonal")
"""Named initialisations of LoRA under which W + scale * B A is the trained weight; the others also change W."""

Shape = tuple[int, ...]


class TransferError(ValueError):
    """An adapter that does not fit its sibling; `faults` holds one sentence each."""

    def __init__(self, faults: Sequence[str]):
        self.faults = list(faults)
        super().__init__("\n".join(self.faults))


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk.

    Attributes:
        source: what it was asked for by: a folder or a Hub id.
        folder: where its two files lie.
        config: its adapter_config.json.
        shapes: of its tensors, by the name in the file.
    """

    source: str
    folder: Path
    config: PeftConfig
    shapes: dict[str, Shape]

    @property
    def base(self) -> str | None:
        """The model that it was trained on, as far as it says so."""
        return self.config.base_model_name_or_path or None

    def fingerprint(self) -> str:
        """Digest of the file with its tensors."""
        data = (self.folder / SAFETENSORS_WEIGHTS_NAME).read_bytes()
        return hashlib.blake2b(data, digest_size=8).hexdigest()


def find_adapter(source: str) -> Adapter:
    """Finds an adapter and reads its configuration and the shapes of its tensors, but no tensor.

    Args:
        source: a folder, or a Hub id, of which only the two files of an adapter are downloaded.

    Raises:
        OSError: there is no such folder or repository, or it holds no adapter in safetensors.
        ValueError: its files are not what they should be.
    """
    folder = Path(source)
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(source, allow_patterns=[ADAPTER_FILE, SAFETENSORS_WEIGHTS_NAME]))
        except (OSError, HFValidationError) as err:
            raise OSError(
                f"Adapter {source!r} was not found: it is no folder, it is not in the local cache, and the Hub was not "
                "reachable or has no such repository. Check the spelling, or train the adapter first."
            ) from err
    if not (folder / ADAPTER_FILE).is_file():
        found = " but a whole model. Train with `use_peft: true`" if (folder / "config.json").is_file() else ""
        raise OSError(f"{source} holds no {ADAPTER_FILE}{found}; expected the folder of a PEFT adapter.")
    if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise OSError(
            f"{source} holds no {SAFETENSORS_WEIGHTS_NAME}; adapters are read from safetensors only, never from a "
            "pickled adapter_model.bin. Save the adapter again with a current `peft`."
        )
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return Adapter(source, folder, PeftConfig.from_pretrained(str(folder)), shapes)
    except Exception as err:  # safetensors and peft raise several kinds for broken files
        raise ValueError(f"{source} is no readable adapter: {err}") from err


def check_transfer(
    adapter: Adapter, sibling_config: PreTrainedConfig, sibling: str, trust_remote_code: bool = False
) -> list[str]:
    """Checks that an adapter fits a model, from configurations and shapes alone.

    Args:
        adapter: what `find_adapter` returned.
        sibling_config: configuration of the model that is to get it.
        sibling: that model's folder or Hub id.
        trust_remote_code: run modelling code that comes with the two models. Off unless asked for.

    Returns:
        What is worth knowing though it is no fault.

    Raises:
        TransferError: with every mismatch of configurations, names and shapes.
    """
    kind_faults = _unfit_kinds(adapter.config)
    faults = list(kind_faults)
    if adapter_config(sibling):
        faults.append(f"{sibling} is an adapter itself; expected a whole model. Name the model below it.")
    more, notes = _compare_with_base(adapter, sibling_config, sibling, trust_remote_code)
    faults += more
    if not kind_faults:
        faults += _misfits(adapter, sibling_config, trust_remote_code)
    if faults:
        raise TransferError(faults)
    if getattr(adapter.config, "modules_to_save", None):
        names = ", ".join(adapter.config.modules_to_save)
        notes.append(f"The adapter replaces whole modules of the sibling by those trained on the base: {names}.")
    for note in notes:
        logger.warning(note)
    return notes


def put_adapter(model: PreTrainedModel, adapter: Adapter, sibling: str, revision: str | None = None) -> PeftModel:
    """Puts a checked adapter on a model.

    Args:
        model: the sibling, with its weights.
        adapter: one that `check_transfer` let pass.
        sibling: the model's folder or Hub id, which the adapter's configuration names from now on.
        revision: the model's branch, tag or commit.

    Returns:
        The model with the adapter, frozen; every tensor of the file is in its place.

    Raises:
        TransferError: naming the tensors that are not.
    """
    config = copy.deepcopy(adapter.config)
    config.base_model_name_or_path, config.revision = sibling, revision
    model = PeftModel.from_pretrained(model, str(adapter.folder), config=config)
    placed = get_peft_model_state_dict(model, save_embedding_layers=False)
    faults = [
        f"{name}: the file's tensor is not in the model after loading."
        for name, tensor in load_file(adapter.folder / SAFETENSORS_WEIGHTS_NAME).items()
        if name not in placed or not torch.equal(placed[name].cpu(), tensor.to(placed[name].dtype))
    ]
    if faults:
        raise TransferError(faults)
    return model


def _unfit_kinds(config: PeftConfig) -> list[str]:
    """Adapters whose tensors alone do not say what they do to another model."""
    if config.is_prompt_learning:
        return [f"the adapter learns a prompt ({config.peft_type.value}), no weights. Expected LoRA or its like."]
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init.lower() not in INITS_THAT_KEEP_THE_BASE:
        return [
            f"the adapter was begun with init_lora_weights={init!r}, which also changed the weights below it; its B A "
            "means nothing on another model. Save it with `path_initial_model_for_weight_conversion`, or train with "
            "init_lora_weights=True."
        ]
    return []


def _compare_with_base(
    adapter: Adapter, sibling_config: PreTrainedConfig, sibling: str, trust_remote_code: bool
) -> tuple[list[str], list[str]]:
    """Faults and notes from the configuration of the model that the adapter was trained on."""
    base = adapter.base
    if base is None:
        return [], [
            f"{adapter.source} does not say which model it was trained on; only names and shapes were compared."
        ]
    if base == sibling or Path(base).resolve() == Path(sibling).resolve():
        return [], [f"{adapter.source} was trained on {sibling} itself: this evaluates it and transfers nothing."]
    try:
        base_config = load_config(base, adapter.config.revision, trust_remote_code)
    except (OSError, ValueError) as err:
        reason = str(err).splitlines()[0]
        return [], [f"The configuration of {base} could not be read, so only names and shapes were compared ({reason})"]
    return list(_config_faults(base_config, sibling_config, base, sibling)), []


def _config_faults(base: PreTrainedConfig, other: PreTrainedConfig, base_name: str, other_name: str) -> Iterator[str]:
    others = _parts(other)
    for part, config in _parts(base).items():
        for key in SAME_IN_SIBLINGS:
            expected, found = getattr(config, key, None), getattr(others.get(part), key, None)
            if expected != found:
                yield f"config: {part}{key} is {expected} in {base_name}, which was trained, {found} in {other_name}."


def _parts(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configuration and those inside it, by the prefix of their keys."""
    return {"": config, **{f"{name}.": getattr(config, name) for name in config.sub_configs if hasattr(config, name)}}


def _misfits(adapter: Adapter, config: PreTrainedConfig, trust_remote_code: bool) -> list[str]:
    """Every tensor without its place in the sibling, every place without its tensor, every difference in shape."""
    try:
        places, own = _places(adapter.config, config, trust_remote_code)
    except ValueError as err:  # none of the target modules is there
        return [f"target_modules: {err}", *_missing_places(adapter.shapes)]
    faults = []
    for name, found in adapter.shapes.items():
        if name in places and places[name] != found:
            faults.append(f"{name}: expected shape {places[name]}, found {found}.")
        elif name in own and name not in places:
            faults.append(
                f"{name}: expected no weight of the base model in an adapter, found {found}; it would replace the "
                "sibling's own. Save the adapter with save_embedding_layers=False."
            )
    faults += _missing_places({name: found for name, found in adapter.shapes.items() if name not in {*places, *own}})
    return faults + [
        f"{name}: expected shape {shape}, found no such tensor in the adapter."
        for name, shape in places.items()
        if name not in adapter.shapes
    ]


def _missing_places(shapes: Mapping[str, Shape]) -> list[str]:
    return [
        f"{name}: expected nothing, the sibling has no such module; found {found}." for name, found in shapes.items()
    ]


def _places(
    adapter_config: PeftConfig, config: PreTrainedConfig, trust_remote_code: bool
) -> tuple[dict[str, Shape], set[str]]:
    """Shapes that the sibling has for an adapter's tensors, and the names of its own weights; nothing is allocated."""
    adapter_config = copy.deepcopy(adapter_config)
    adapter_config.base_model_name_or_path = None  # or PEFT warns that it is another model
    if hasattr(adapter_config, "init_lora_weights"):
        adapter_config.init_lora_weights = True
    with init_empty_weights():
        model = model_class(config).from_config(config, trust_remote_code=trust_remote_code)
        model = get_peft_model(model, adapter_config)
    places = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tuple(tensor.shape) for name, tensor in places.items()}, set(model.state_dict()) - set(places)
