"""Loading models and processors, and what a processor writes for an image; a model's parts are found in `groups`.

Nothing is keyed on a family's name: module groups come from where the model keeps its decoder and its image encoder,
and the image placeholder from what the processor's chat template writes.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from peft import PeftModel
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
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from biasunlearn_trainer.adapters import ADAPTER_FILE, adapter_config, base_of, processor_folder, put_on
from biasunlearn_trainer.groups import (
    GROUPS,
    base_model,
    check_groups,
    freeze_groups,
    group_of,
    has_fresh_adapter,
    lora_targets,
    module_groups,
)
from biasunlearn_trainer.sharding import is_partitioned

__all__ = [
    "ADAPTER_FILE",
    "GROUPS",
    "accept_published_names",
    "base_model",
    "check_groups",
    "evaluating",
    "freeze_groups",
    "group_of",
    "has_fresh_adapter",
    "image_placeholder",
    "image_token_id",
    "keeping_frozen",
    "lays_image_tokens",
    "load_config",
    "load_model",
    "load_processor",
    "lora_targets",
    "model_class",
    "module_groups",
    "template_owner",
    "tokenizer_of",
    "undisturbed",
    "without_dropout",
]

logger = logging.getLogger(__name__)


def load_config(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's configuration, without its weights; of an adapter, that of its base.

    Raises:
        OSError: where the name is neither a folder, nor in the local cache, nor to be had from the Hub, or is an
            adapter that does not say what it belongs on.
    """
    if adapter := adapter_config(name_or_path, revision):
        name_or_path, revision = base_of(adapter, name_or_path, revision)
    return _config(name_or_path, revision, trust_remote_code)


def _config(name_or_path: str, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
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
        name_or_path: a folder or a Hub id; that of an adapter loads the adapter's base and puts the adapter on top.
        dtype: precision of the weights; None keeps the checkpoint's.
        revision: branch, tag or commit on the Hub. With the folder of an adapter, that of its base.
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
    if adapter := adapter_config(name_or_path, revision):
        base, options["revision"] = base_of(adapter, name_or_path, revision)
        return put_on(load_model(base, **options), name_or_path, revision)
    config = load_config(name_or_path, revision, trust_remote_code)
    model = model_class(config).from_pretrained(name_or_path, use_safetensors=True, **options)
    accept_published_names(model)
    if is_partitioned(model):
        # What transformers 5.23 notes while it loads partitions, it applies twice when they are saved
        # ("language_model.model.model"); without the note it saves the family's published names.
        model.__dict__.pop("_weight_conversions", None)
    if quantization_config is not None:
        _keep_unpacked(model)
    return model


def _keep_unpacked(model: nn.Module) -> None:
    """Has bitsandbytes leave 4-bit weights as they are when a model is evaluated on a CPU.

    It would lay them out for inference, and a training step after that would get no gradient through them (0.50, CPUs
    with AVX512-BF16).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


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
    own, adapter = None, adapter_config(name_or_path, revision)
    if adapter:
        own = processor_folder(name_or_path, revision)
        name_or_path, revision = base_of(adapter, name_or_path, revision)
    config = _config(name_or_path, revision, trust_remote_code)
    loader = AutoProcessor if model_class(config) is AutoModelForImageTextToText else AutoTokenizer
    if own:
        name_or_path, revision = own, None
    processing_class = loader.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(processing_class)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processing_class


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
def keeping_frozen(model: nn.Module) -> Iterator[None]:
    """What is frozen before the block is frozen after it: PEFT makes an adapter trainable that it switches or loads.

    Else a part of an adapter that stays as it is would get gradients, which no optimizer uses but every norm counts.
    """
    trained = [(value, value.requires_grad) for value in model.parameters()]
    try:
        yield
    finally:
        for value, is_trained in trained:
            if value.requires_grad != is_trained:
                value.requires_grad_(is_trained)


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
