"""Models whose weights are spread over the processes, by ZeRO-3 or FSDP, and what they need to be read and called.

`from_pretrained` partitions weights as it loads them where the launch says ZeRO-3. Such a model cannot be called before
it is in an engine, and its `state_dict` holds nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.integrations import deepspeed as hf_deepspeed

FSDP_VARIABLE, DEEPSPEED_VARIABLE = "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"


def is_sharded() -> bool:
    """Whether training spreads the weights over the processes (ZeRO-3, FSDP)."""
    return hf_deepspeed.is_deepspeed_zero3_enabled() or is_fsdp()


def is_fsdp() -> bool:
    """Whether the launch says FSDP."""
    return os.environ.get(FSDP_VARIABLE, "").lower() == "true"


def backend() -> str:
    """How this launch spreads a model: `whole` (one process or DDP), `ZeRO-2`, `ZeRO-3` or `FSDP`."""
    if hf_deepspeed.is_deepspeed_zero3_enabled():
        return "ZeRO-3"
    if os.environ.get(DEEPSPEED_VARIABLE, "").lower() == "true":
        return "ZeRO-2"
    return "FSDP" if is_fsdp() else "whole"


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread this model's weights already."""
    return any(hasattr(weight, "ds_id") for weight in model.parameters())


def num_weights(parameter: Tensor) -> int:
    """How many numbers a parameter holds, here and on the other processes."""
    return getattr(parameter, "ds_numel", parameter.numel())


@contextmanager
def whole_weights() -> Iterator[None]:
    """Models loaded inside are whole on every process, even where training shards them.

    `from_pretrained` looks at two globals: DeepSpeed's config (ZeRO-3 partitions while loading) and FSDP's environment
    variable (all ranks but the first load nothing).
    """
    config, fsdp = hf_deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(FSDP_VARIABLE, None)
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config
        if fsdp is not None:
            os.environ[FSDP_VARIABLE] = fsdp


@contextmanager
def gathered(weight: Tensor) -> Iterator[Tensor]:
    """Inside, the whole of a weight to read; every process has to enter."""
    if not hasattr(weight, "ds_id"):
        yield weight
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight]):
        yield weight


def inference_engine(model: nn.Module) -> Any:
    """Puts a partitioned model into an engine without an optimizer, which gathers its weights layer by layer."""
    import deepspeed

    dtype = next(model.parameters()).dtype
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    config |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": dtype == torch.float16}}
    return deepspeed.initialize(model=model, config=config)[0]


class ForgetGradients(TrainerCallback):
    """Sets the gradients in a ZeRO-3 engine to 0 before each step.

    DeepSpeed (0.19.8) overwrites a weight's gradient of the last step when a new one comes. To a weight that a step
    leaves out none comes, and the optimizer would take the old one once more.

    Args:
        trainer: whose `deepspeed` is the engine, once training has begun.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Called before the first micro-batch of a step."""
        optimizer = getattr(self.trainer.deepspeed, "optimizer", None)
        gradients = getattr(optimizer, "grad_partitions_flat_buffer", None)
        if gradients is not None:
            gradients.zero_()


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Inside, a model can be called that ZeRO-3 partitioned while it was loaded; any other can be called anyway."""
    if not is_partitioned(model):
        yield
        return
    engine = inference_engine(model)
    try:
        yield
    finally:
        engine.destroy()
