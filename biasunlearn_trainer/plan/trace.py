"""One optimizer step of a trainer without values, and the bytes that were alive in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from torch import Tensor, nn

from biasunlearn_trainer.models import without_dropout
from biasunlearn_trainer.plan.meter import StepBytes
from biasunlearn_trainer.plan.shadow import Shadow
from biasunlearn_trainer.saliency.fisher import add_squared_gradients, empty_sums

COMPUTED_IN = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Weight:
    """A parameter, or a buffer, of the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return int(torch.Size(self.shape).numel())

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.numel * self.dtype.itemsize


@dataclass
class Step:
    """What is alive in one optimizer step on one process that holds everything itself; all sizes in bytes.

    Attributes:
        weights: parameters and buffers of the model, each once.
        reference: of a second model.
        mask: of the saliency mask.
        kept: of the copy of weights that a mask of scope `update` puts back.
        levels: by the bytes of gradients of weights that are alive, the most bytes of activations beside them.
        tokens: that the policy reads in a micro-batch.
        blocks: elements of what is in no layer, then of every layer.
        building: of everything while the mask is made; 0 where it is not.
        tables: of the reference's log-probabilities, where they are computed once.
    """

    weights: list[Weight]
    reference: int
    mask: int
    kept: int
    levels: dict[int, int]
    tokens: int
    blocks: list[int] = field(default_factory=list)
    building: int = 0
    tables: int = 0

    @property
    def trainable(self) -> list[Weight]:
        """The weights that get gradients."""
        return [weight for weight in self.weights if weight.trainable]


def trace_step(
    shadow: Shadow,
    trainer: Any,
    batch: Mapping[str, Mapping[str, Tensor]],
    precision: str = "no",
    measured: Mapping[str, Tensor] | None = None,
) -> Step:
    """Take the loss of a batch and its gradients, as training does, and watch what is alive.

    Args:
        shadow: where the trainer was built.
        trainer: what `build_trainer` returned.
        batch: collated rows by stream.
        precision: of the computation: `no` for that of the weights, `bf16` or `fp16`.
        measured: collated rows of which the Fisher diagonal is made, where the run builds a mask.
    """
    model = trainer.model
    building = _building(shadow, trainer, measured) if measured is not None else 0
    with shadow:
        trainer.prepare_saliency()
    models, tables, (mask, kept) = _reference_models(trainer), _tables(trainer), _mask_tensors(trainer)
    with shadow:
        enable_checkpointing(trainer)
        compute_in(model, precision)
        model.train()
        with StepBytes(model, [*models, *tables, *mask, *kept]) as meter:
            meter.add(value for part in batch.values() for value in part.values())
            # The second micro-batch of a step finds the gradients of the first.
            for _ in range(min(2, trainer.args.gradient_accumulation_steps)):
                trainer.compute_loss(model, batch).backward()
        meter.close()
    return Step(
        weights=_weights(model),
        reference=_bytes(models),
        tables=_bytes(tables),
        mask=_bytes(mask),
        kept=_bytes(kept),
        levels=meter.levels,
        tokens=sum(int(part["attention_mask"].sum()) for part in trainer.arrange(dict(batch)).values()),
        blocks=_blocks(model),
        building=building,
    )


def held_tensors(trainer: Any) -> list[Tensor]:
    """What a trainer holds beside its model: weights and tables of references, and a saliency mask."""
    mask, kept = _mask_tensors(trainer)
    return [*_reference_models(trainer), *_tables(trainer), *mask, *kept]


def _building(shadow: Shadow, trainer: Any, rows: Mapping[str, Tensor]) -> int:
    """The most bytes while a mask is made: weights, sums of squared gradients, and the passes over a few rows."""
    model, once = trainer.model, 1 if not trainer.args.saliency_one_pass else 2
    with shadow, without_dropout(model):
        sums = [empty_sums(model) for _ in range(once)]  # held twice, the other set's are as large
        held = [value for part in sums for value in part.values()]
        with StepBytes(model, [*held, *_reference_models(trainer), *_tables(trainer)]) as meter:
            add_squared_gradients(model, rows, sums[0])
        meter.close()
    return meter.peak


def enable_checkpointing(trainer: Any) -> None:
    """What `Trainer.train` does about it."""
    if not trainer.args.activation_checkpointing:
        return
    settings = dict(trainer.args.activation_checkpointing_kwargs or {})
    every, offload = settings.pop("every_n_layers", 1), settings.pop("offload", False)
    trainer.model.activation_checkpointing_enable(
        activation_checkpointing_kwargs=settings or None, every_n_layers=every, offload=offload
    )


def compute_in(model: nn.Module, precision: str) -> None:
    """What `Accelerator.prepare_model` does for mixed precision."""
    if precision in COMPUTED_IN:
        context = torch.autocast("cpu", dtype=COMPUTED_IN[precision])
        model.forward = convert_outputs_to_fp32(context(model.forward))


def _weights(model: nn.Module) -> list[Weight]:
    found = {id(value): value for value in (*model.parameters(), *model.buffers())}
    return [Weight(tuple(value.shape), value.dtype, value.requires_grad) for value in found.values()]


def _blocks(model: nn.Module) -> list[int]:
    """Elements of each layer that is gathered for itself where weights are sharded, and of all that is in none."""
    layers = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        if type(layer).__name__ in (getattr(model, "_no_split_modules", None) or ())
    ]
    sizes = [sum(value.numel() for value in layer.parameters()) for layer in layers]
    return [sum(value.numel() for value in model.parameters()) - sum(sizes), *sizes]


def _reference_models(trainer: Any) -> list[Tensor]:
    models = {id(part.model): part.model for part in trainer.reference.values() if hasattr(part, "model")}
    tensors = [value for model in models.values() for value in (*model.parameters(), *model.buffers())]
    own = {id(value) for value in trainer.model.parameters()}
    heads = {id(part.head): part.head for part in trainer.reference.values() if hasattr(part, "head")}
    return tensors + [value for head in heads.values() for value in head.parameters() if id(value) not in own]


def _tables(trainer: Any) -> list[Tensor]:
    return [part.table for part in trainer.reference.values() if hasattr(part, "table")]


def _mask_tensors(trainer: Any) -> tuple[list[Tensor], list[Tensor]]:
    mask = trainer._gradient_mask
    return ([], []) if mask is None else ([*mask.salient.values()], [*getattr(mask, "_kept", {}).values()])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(value.untyped_storage().nbytes() for value in tensors)
