"""A model's parts, found in its own structure: module groups, what LoRA goes on, what is frozen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

from torch import nn
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from biasunlearn_trainer.sharding import num_weights

GROUPS = ("language_model", "connector", "vision_tower")


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
        f"{name} ({sum(map(num_weights, module.parameters())):,} weights)" for name, module in _outer_parts(model)
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
    heaviest = max(parts, key=lambda part: sum(map(num_weights, part[1].parameters())))
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
    width = decoder.get_input_embeddings().embedding_dim
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
