"""Where in a model a weight is: its module group, its layer, the kind of its module.

Read from the model's structure: layers are what an `nn.ModuleList` holds, groups are those of `models.module_groups`.
Names of a LoRA adapter's weights stand for the module that the adapter is on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from biasunlearn_trainer.models import base_model, group_of, module_groups

PEFT_PREFIX = "base_model.model."
PEFT_PARTS = re.compile(r"\.(lora_\w+|base_layer|modules_to_save|original_module)(\..*)?$")
PARAMETERS = re.compile(r"\.(weight|bias)$")


@dataclass(frozen=True)
class Place:
    """Where a weight is.

    Attributes:
        group: `language_model`, `connector`, `vision_tower`, or as a user named the groups.
        layer: its number in the stack of layers, from 0; None outside of one.
        kind: the module's name inside its layer (`self_attn.q_proj`); without a layer, inside its group
            (`embed_tokens`). Weight and bias of a module are in one place.
    """

    group: str
    layer: int | None
    kind: str


def module_name(name: str) -> str:
    """The module of the base model that a weight belongs to; the name itself of a weight that is no module's `weight`.

    Example:
        >>> module_name("base_model.model.model.layers.0.mlp.up_proj.lora_B.default.weight")
        'model.layers.0.mlp.up_proj'
        >>> module_name("query_tokens")
        'query_tokens'
    """
    return PARAMETERS.sub("", PEFT_PARTS.sub("", name.removeprefix(PEFT_PREFIX)))


class Places:
    """The places of a model's weights.

    Args:
        model: inside PEFT or not; on any device, also on `meta`.
        groups: what `module_groups` is to take instead of what it finds.

    Attributes:
        sizes: weights in each place, without those of an adapter; group by group, in the model's order.
    """

    def __init__(self, model: nn.Module, groups: Mapping[str, Sequence[str]] | None = None):
        base = base_model(model)
        self._groups = module_groups(model, groups)
        self._lists = {name for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
        self._stacks = sorted(name for name in self._lists if not _inside_any(name, self._lists - {name}))
        self._stacks_of: dict[str, list[str]] = {group: [] for group in self._groups}
        for stack in self._stacks:
            self._stacks_of[group_of(stack, self._groups)].append(stack)
        parameters = {name: value for name, value in base.named_parameters() if "lora_" not in name}
        modules = dict.fromkeys(module_name(name) for name in parameters)
        self._places = self._told_apart({module: self._find(module) for module in modules})
        sizes: dict[Place, int] = {}
        for name, value in parameters.items():
            place = self.of(name)
            sizes[place] = sizes.get(place, 0) + value.numel()
        order = [*self._groups]
        self.sizes = dict(sorted(sizes.items(), key=lambda item: order.index(item[0].group)))

    def of(self, name: str) -> Place:
        """The place of a weight, by its name in the model or in an adapter on it.

        Raises:
            KeyError: where the model has no such weight.
        """
        module = module_name(name)
        if module not in self._places:
            raise KeyError(f"The model has no weight {name}; of its modules none is {module}.")
        return self._places[module]

    def _find(self, module: str) -> Place:
        group = group_of(module, self._groups)
        stack = next((stack for stack in self._stacks if module.startswith(f"{stack}.")), None)
        if stack is None:
            above = [stack.rpartition(".")[0] for stack in self._stacks_of[group]]
            return Place(group, None, _below(module, [*self._groups[group], *above]))
        layer, *parts = module.removeprefix(f"{stack}.").split(".")
        # Lists inside a layer hold alternatives of one kind (experts), which share a place.
        heads = [".".join([stack, layer, *parts[:depth]]) for depth in range(len(parts))]
        kind = [part for part, head in zip(parts, heads, strict=True) if head not in self._lists]
        if len(self._stacks_of[group]) > 1:  # an encoder and a decoder
            kind.insert(0, _below(stack.rpartition(".")[0] or stack, self._groups[group]))
        return Place(group, int(layer), ".".join(kind) or stack.rpartition(".")[2])

    @staticmethod
    def _told_apart(found: dict[str, Place]) -> dict[str, Place]:
        """Modules outside of layers that would share a place get their whole names."""
        alone = [place for place in found.values() if place.layer is None]
        return {
            module: Place(place.group, None, module) if place.layer is None and alone.count(place) > 1 else place
            for module, place in found.items()
        }


def _inside_any(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _below(name: str, prefixes: Iterable[str]) -> str:
    """A name without the longest of the prefixes that it has; its last part where nothing is left."""
    fits = [prefix for prefix in prefixes if prefix and (name == prefix or name.startswith(f"{prefix}."))]
    rest = name.removeprefix(max(fits, key=len)).lstrip(".") if fits else name
    return rest or name.rpartition(".")[2]
