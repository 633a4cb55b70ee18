"""Loading models and processors, and finding a model's parts from its own structure.

Nothing here is keyed on a family's name: module groups come from where the model keeps its decoder and its image
encoder, and the image placeholder from what the processor's chat template writes.
"""

from __future__ import annotations

import logging
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

logger = logging.getLogger(__name__)

GROUPS = ("language_model", "connector", "vision_tower")
ADAPTER_FILE = "adapter_config.json"
FSDP_VARIABLE = "ACCELERATE_USE_FSDP"


def load_config(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration, without its weights; of an adapter's folder, that of its base.

    Raises:
        OSError: where the name is neither a folder, nor in the local cache, nor to be had from the Hub.
    """
    if _is_adapter(name_or_path):
        name_or_path = _base_of(name_or_path)
    try:
        return AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except OSError as err:
        raise OSError(
            f"Model {name_or_path!r} was not found: it is no folder with a config.json, it is not in the local cache, "
            "and the Hub was not reachable or has no such model. Check the spelling, or download it first "
            f"(`hf download {name_or_path}`)."
        ) from err


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    quantization_config: object | None = None,
    trust_remote_code: bool = False,
    device_map: object | None = None,
) -> PreTrainedModel | PeftModel:
    """Load a causal or an image-text model, whichever its configuration says, from safetensors only.

    Args:
        name_or_path: a folder or a Hub id; a folder with an adapter loads the adapter's base and puts it on top.
        dtype: precision of the weights; None keeps the checkpoint's.
        revision: branch, tag or commit on the Hub.
        attn_implementation: for instance `sdpa` or `flash_attention_2`.
        quantization_config: for instance `BitsAndBytesConfig` (QLoRA).
        trust_remote_code: run code that comes with the model. Off unless asked for.
        device_map: where to put the weights, for quantised models.

    Raises:
        OSError: where there is no such model.
    """
    options = {
        "dtype": dtype,
        "revision": revision,
        "attn_implementation": attn_implementation,
        "quantization_config": quantization_config,
        "trust_remote_code": trust_remote_code,
        "device_map": device_map,
    }
    options = {key: value for key, value in options.items() if value is not None}
    if _is_adapter(name_or_path):
        return _put_on(load_model(_base_of(name_or_path), **options), name_or_path)
    config = load_config(name_or_path, revision, trust_remote_code)
    model = model_class(config).from_pretrained(name_or_path, use_safetensors=True, **options)
    accept_published_names(model)
    return model


def accept_published_names(model: PreTrainedModel) -> None:
    """Make `load_state_dict` take weights under the names that `save_pretrained` writes.

    Families that were renamed inside transformers (LLaVA, Qwen2-VL) are saved under their published names. The Trainer
    loads a checkpoint's file as it stands: it would find none of its names, warn, and go on from the weights of the
    start.

    Args:
        model: changed in place; once is enough, twice does no harm.
    """
    model.register_load_state_dict_pre_hook(_take_own_names)


def _take_own_names(model: PreTrainedModel, state_dict: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    own = model.state_dict()
    if prefix or not state_dict.keys() - own.keys():
        return
    names = {id(tensor): name for name, tensor in own.items()}
    for published, tensor in revert_weight_conversion(model, dict(own)).items():
        if published in state_dict and published not in own and id(tensor) in names:
            state_dict[names[id(tensor)]] = state_dict.pop(published)


def _is_adapter(path: str) -> bool:
    return (Path(path) / ADAPTER_FILE).is_file()


def _base_of(adapter_path: str) -> str:
    return PeftConfig.from_pretrained(adapter_path).base_model_name_or_path


def _put_on(base: PreTrainedModel, adapter_path: str) -> PeftModel:
    if not (Path(adapter_path) / SAFETENSORS_WEIGHTS_NAME).is_file():
        raise OSError(f"{adapter_path} holds no {SAFETENSORS_WEIGHTS_NAME}; adapters are read from safetensors only.")
    return PeftModel.from_pretrained(base, adapter_path, is_trainable=True)  # unlearning may go on from it


def model_class(config: PreTrainedConfig) -> type:
    """The automatic class that builds the model of a configuration: image-text or causal."""
    is_image_text = config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM


def load_processor(
    name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """The processor of an image-text model, the tokenizer of a language model.

    A tokenizer without a pad token gets its EOS as one; padding is masked out by position everywhere, never by id.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name_or_path, **options)
    loader = AutoProcessor if model_class(config) is AutoModelForImageTextToText else AutoTokenizer
    saved_with_it = any(
        (Path(name_or_path) / name).is_file() for name in ("tokenizer_config.json", "processor_config.json")
    )
    if _is_adapter(name_or_path) and not saved_with_it:
        name_or_path = _base_of(name_or_path)
    processing_class = loader.from_pretrained(name_or_path, **options)
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processing_class


def is_sharded() -> bool:
    """Whether training spreads the weights over the processes (ZeRO-3, FSDP)."""
    return hf_deepspeed.is_deepspeed_zero3_enabled() or os.environ.get(FSDP_VARIABLE, "").lower() == "true"


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module is back in its own mode afterwards, which need not be the model's."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off and no gradients, until the end of the block."""
    with without_dropout(model), torch.no_grad():
        yield


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluates inside, in eval mode and without gradients, and puts back each module's mode and every random state.

    Args:
        model: the model in training; modules may stand in different modes (a frozen tower in eval mode).
    """
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        with evaluating(model):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if cuda_states is not None:
            torch.cuda.set_rng_state_all(cuda_states)


def tokenizer_of(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer inside a processor, or the tokenizer itself."""
    return getattr(processing_class, "tokenizer", processing_class)


def image_token_id(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> int | None:
    """The id that image features are laid over; None where the processor knows no images."""
    token = getattr(processing_class, "image_token", None)
    return None if token is None else tokenizer_of(processing_class).convert_tokens_to_ids(str(token))


def template_owner(
    processing_class: ProcessorMixin | PreTrainedTokenizerBase,
) -> ProcessorMixin | PreTrainedTokenizerBase:
    """Who renders chats: the processor, or its tokenizer where the processor has no template (BLIP-2's cannot)."""
    has_own = getattr(processing_class, "chat_template", None)
    return processing_class if has_own else tokenizer_of(processing_class)


def lays_image_tokens(processing_class: ProcessorMixin | PreTrainedTokenizerBase) -> bool:
    """Whether the processor puts image tokens before the text by itself, as many as there are queries (BLIP-2).

    Raises:
        ValueError: where it would, but was not told how many.
    """
    if not hasattr(processing_class, "num_query_tokens"):
        return False
    if not processing_class.num_query_tokens:
        raise ValueError(
            f"{type(processing_class).__name__} was saved without `num_query_tokens`, so pictures would get no tokens. "
            "Set it to the model's `config.num_query_tokens` and save the processor again."
        )
    return True


def image_placeholder(processing_class: ProcessorMixin) -> str:
    """What stands in a prompt for one image, as the family's own chat template writes it.

    The template is rendered with and without an image, and the difference is the placeholder: `<image>` and a
    newline for LLaVA, `<|vision_start|><|image_pad|><|vision_end|>` for Qwen2-VL. Without a template it is the
    image token and a newline. A processor that puts its image tokens in by itself (BLIP-2's) needs none, unless a
    template names a place for them.
    """
    owner, by_itself = template_owner(processing_class), lays_image_tokens(processing_class)
    if not owner.chat_template:
        return "" if by_itself else f"{processing_class.image_token}\n"
    text = {"type": "text", "text": "X"}
    bare, pictured = (
        owner.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        for content in ([text], [{"type": "image"}, text])
    )
    start = next((i for i, (a, b) in enumerate(zip(bare, pictured, strict=False)) if a != b), len(bare))
    found = pictured[start : len(pictured) - (len(bare) - start)]
    # A template for texts alone writes a list of parts as it stands, or nothing.
    return "" if by_itself and str(processing_class.image_token) not in found else found


def module_groups(model: nn.Module, override: Mapping[str, Sequence[str]] | None = None) -> dict[str, list[str]]:
    """Name the parts of a model.

    Args:
        model: a transformers model, inside PEFT or not.
        override: module-name prefixes by group, in place of what is found. The groups may have any names, and are to
            cover every parameter.

    Returns:
        Module-name prefixes by group: `language_model` (decoder and output head), and, for image-text models,
        `vision_tower` and `connector` (all that lies between the two). Together they cover every parameter; where two
        prefixes fit a name, the longer one counts.

    Raises:
        ValueError: where an image-text model keeps its decoder or its image encoder where nobody looks for them; where
            a prefix of the override fits no parameter, or a parameter has no group.
    """
    model = base_model(model)
    if override is not None:
        return _checked_groups(model, override)
    names = {module: name for name, module in model.named_modules()}
    vision, decoder, head = model.get_encoder(modality="image"), model.get_decoder(), model.get_output_embeddings()
    has_vision = vision is not model and vision in names
    if not has_vision and not _is_image_text(model.config):
        return {"language_model": [""]}
    if not has_vision or decoder is model or decoder not in names or _holds(decoder, vision):
        raise ValueError(_groups_message(model, vision if has_vision else None, decoder, names))
    inside = names[decoder]
    groups = {
        "language_model": [inside] + [names[m] for m in (head,) if m is not None and not _inside(names[m], inside)],
        "connector": _merger(vision, names, decoder),
        "vision_tower": [names[vision]],
    }
    known = [prefix for prefixes in groups.values() for prefix in prefixes]
    for name, _ in model.named_parameters():
        if not any(_inside(name, prefix) for prefix in known):
            prefix = _outermost(name, known)
            groups["connector"].append(prefix)
            known.append(prefix)
    return groups


def _is_image_text(config: PreTrainedConfig) -> bool:
    return config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES or hasattr(config, "vision_config")


def _holds(outer: nn.Module, inner: nn.Module) -> bool:
    return any(module is inner for module in outer.modules())


def _groups_message(model: nn.Module, vision: nn.Module | None, decoder: nn.Module, names: dict[nn.Module, str]) -> str:
    """What was found of a model whose parts have no place of their own, and how to name them."""
    parts = ", ".join(
        f"{name} ({sum(value.numel() for value in module.parameters()):,} weights)"
        for name, module in _outer_parts(model)
    )
    found_vision = "none" if vision is None else repr(names[vision])
    found_decoder = "the whole model" if decoder is model else repr(names.get(decoder, "not a part of it"))
    return (
        f"No module groups found in {type(model).__name__}: image encoder {found_vision}, decoder {found_decoder}. Its "
        f"parts: {parts}. Name them yourself: module_groups(model, {{'language_model': [...], 'connector': [...], "
        "'vision_tower': [...]}) with module names such as these."
    )


def _outer_parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """A model's children; in place of a single one that holds all of them, that one's."""
    parts = [(name, module) for name, module in model.named_children() if any(True for _ in module.parameters())]
    heaviest = max(parts, key=lambda part: sum(value.numel() for value in part[1].parameters()))
    inner = [(f"{heaviest[0]}.{name}", module) for name, module in heaviest[1].named_children()]
    return [part for part in parts if part is not heaviest] + (inner or [heaviest])


def _checked_groups(model: nn.Module, override: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    groups = {
        group: [prefixes] if isinstance(prefixes, str) else list(prefixes) for group, prefixes in override.items()
    }
    names = [name for name, _ in model.named_parameters()]
    faults = [
        f"{prefix!r} of group {group!r} is no part of {type(model).__name__}"
        for group, prefixes in groups.items()
        for prefix in prefixes
        if not any(_inside(name, prefix) for name in names)
    ]
    known = [prefix for prefixes in groups.values() for prefix in prefixes]
    left = sorted({_outermost(name, known) for name in names if not any(_inside(name, prefix) for prefix in known)})
    faults += [f"{prefix!r} is in no group" for prefix in left]
    if faults:
        shown = "; ".join(faults[:10]) + (f"; and {len(faults) - 10} more" if len(faults) > 10 else "")
        parts = ", ".join(name for name, _ in _outer_parts(model))
        raise ValueError(f"module_groups: {shown}. The model's parts are: {parts}.")
    return groups


def _merger(vision: nn.Module, names: dict[nn.Module, str], decoder: nn.Module) -> list[str]:
    """A connector inside the image encoder (Qwen2-VL's merger): a child that ends in the text model's width."""
    width = decoder.get_input_embeddings().weight.shape[1]
    mergers = []
    for child in vision.children():
        linears = [m for m in child.modules() if isinstance(m, nn.Linear)]
        if linears and linears[-1].out_features == width and not isinstance(child, nn.ModuleList):
            mergers.append(child)
    # CLIP's own encoder is a single child beside embeddings; a merger stands after a list of blocks.
    has_blocks = any(isinstance(child, nn.ModuleList) for child in vision.children())
    return [names[m] for m in mergers] if has_blocks else []


def _inside(name: str, prefix: str) -> bool:
    return not prefix or name == prefix or name.startswith(prefix + ".")


def _outermost(name: str, known: Sequence[str]) -> str:
    """The shortest prefix of a parameter's name that contains none of the known parts."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        prefix = ".".join(parts[:depth])
        if not any(_inside(other, prefix) for other in known):
            return prefix
    return name


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under a PEFT adapter, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def has_fresh_adapter(model: nn.Module) -> bool:
    """Whether a LoRA adapter is on the model that does not change it yet: every B is zero, as it is at the start."""
    ups = [value for name, value in model.named_parameters() if "lora_B" in name or "lora_embedding_B" in name]
    return bool(ups) and not any(value.detach().any() for value in ups)


def group_of(name: str, groups: dict[str, list[str]]) -> str:
    """The group of a parameter or module: that of the longest prefix that fits."""
    fits = [(len(prefix), group) for group, prefixes in groups.items() for prefix in prefixes if _inside(name, prefix)]
    return max(fits)[1]


def check_groups(chosen: Iterable[str], groups: dict[str, list[str]]) -> None:
    """Raise a ValueError that names what the model has, where a chosen group is not among it."""
    for group in chosen:
        if not groups.get(group):
            near = get_close_matches(group, groups, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            have = ", ".join(name for name, prefixes in groups.items() if prefixes)
            raise ValueError(f"The model has no module group {group!r}; it has: {have}.{hint}")


def lora_targets(
    model: nn.Module,
    chosen: Sequence[str] = ("language_model",),
    groups: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """The linear layers of the chosen groups, as the regular expression that `peft` takes for `target_modules`.

    `all-linear` and plain names such as `q_proj` also hit the image encoder; this does not. The output head stays
    out, as is usual for LoRA.

    Args:
        model: the model, before any adapter is put on it.
        chosen: the groups.
        groups: what `module_groups` is to take instead of what it finds.

    Raises:
        ValueError: where the model lacks a chosen group, or a group has no linear layer.
    """
    groups = module_groups(model, groups)
    check_groups(chosen, groups)
    model = base_model(model)
    head = model.get_output_embeddings()
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and group_of(name, groups) in chosen
    ]
    if not names:
        raise ValueError(f"No linear layer in the groups {list(chosen)}. Name `lora_target_modules` yourself.")
    return "|".join(sorted({_layer_pattern(model, name) for name in names}))


def _layer_pattern(model: nn.Module, name: str) -> str:
    """A module's name with the number of each layer open; numbers in an `nn.Sequential` name things of other kinds."""
    parts = name.split(".")
    is_layer = [isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList) for depth in range(len(parts))]
    return r"\.".join(r"\d+" if layer else re.escape(part) for part, layer in zip(parts, is_layer, strict=True))


def freeze_groups(
    model: nn.Module, trainable: Sequence[str] | None, groups: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Freeze what lies outside the chosen groups, and what can never get a gradient.

    Args:
        model: the model, before any adapter is put on it.
        trainable: groups to train; None trains all.
        groups: what `module_groups` is to take instead of what it finds.

    Raises:
        ValueError: where the model lacks a chosen group.
    """
    groups = module_groups(model, groups)
    check_groups(trainable or (), groups)
    unused = _unused_prefixes(model)
    for name, parameter in model.named_parameters():
        wanted = trainable is None or group_of(name, groups) in trainable
        if not wanted or any(_inside(name, prefix) for prefix in unused):
            parameter.requires_grad_(False)


def _unused_prefixes(model: nn.Module) -> list[str]:
    """Vision layers behind the one whose features are read: without a gradient, they break DDP with checkpointing."""
    layer = getattr(model.config, "vision_feature_layer", None)
    layers = [layer] if isinstance(layer, int) else list(layer or [])
    if not layers:  # Qwen2-VL and BLIP-2 read the last one
        return []
    vision = model.get_encoder(modality="image")
    names = {module: name for name, module in model.named_modules()}
    blocks = next((m for m in vision.modules() if isinstance(m, nn.ModuleList)), [])
    # hidden_states[0] is the embedding, so layer -1 is the last block's output and -2 the one before.
    last_used = max(layer if layer >= 0 else len(blocks) + 1 + layer for layer in layers)
    unused = [names[block] for block in blocks[last_used:]]
    unused += [
        name for module, name in names.items() if name.endswith("post_layernorm") and _inside(name, names[vision])
    ]
    return unused
