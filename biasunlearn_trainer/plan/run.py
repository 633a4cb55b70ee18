"""From a recipe to its plan: everything is looked at, nothing is loaded, trained or written."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch import nn
from transformers import PreTrainedConfig
from transformers.integrations import deepspeed as hf_deepspeed

from biasunlearn_trainer.collators import StreamCollator
from biasunlearn_trainer.models import load_config, load_processor
from biasunlearn_trainer.plan.backends import memory
from biasunlearn_trainer.plan.batch import longest_draws, stand_in_batch, stand_in_rows
from biasunlearn_trainer.plan.model import build_model, weights_dtype
from biasunlearn_trainer.plan.optimizers import STATES
from biasunlearn_trainer.plan.quantised import PackedLinear
from biasunlearn_trainer.plan.report import Plan, describe
from biasunlearn_trainer.plan.shadow import Shadow
from biasunlearn_trainer.plan.trace import COMPUTED_IN, Step, trace_step
from biasunlearn_trainer.plan.trainer import build_trainer
from biasunlearn_trainer.recipe import Recipe, RecipeError
from biasunlearn_trainer.runner.data import load_streams, resolve_testbed
from biasunlearn_trainer.runner.launch import backend_faults
from biasunlearn_trainer.sharding import FSDP_VARIABLE, backend, whole_weights
from biasunlearn_trainer.trainers.config import BUILT_MASKS


def show_plan(recipe: Recipe) -> None:
    """Prints a recipe's plan, from the main process; see `plan`."""
    made = plan(recipe)
    if PartialState().is_main_process:
        print(describe(made), flush=True)


def plan(recipe: Recipe) -> Plan:
    """What a recipe's run needs.

    Args:
        recipe: what `parse_recipe` returned; its testbed is resolved in place.

    Returns:
        The plan; `describe` makes text of it.

    Raises:
        RecipeError: the model's configuration cannot be read, or the method, the settings and the backend do not go
            together.
    """
    backend, processes = backend_of(recipe)
    _check_backend(recipe, backend, processes)
    resolve_testbed(recipe)
    config = _config(recipe)
    processing_class, sets, notes = _data(recipe)
    precision = recipe.training.mixed_precision
    mixed = precision in COMPUTED_IN
    dtype = loaded = weights_dtype(config, recipe.model.dtype)
    if mixed and backend in ("zero2", "zero3"):
        dtype, precision = COMPUTED_IN[precision], "no"  # DeepSpeed casts the model itself
    shadow = Shadow()
    try:
        with whole_weights(), _writes_nothing(recipe):
            model = build_model(shadow, recipe, config, dtype)
            rows = sets or {name: stand_in_rows(_most_rows(recipe)) for name in _needed(recipe)}
            trainer = build_trainer(shadow, recipe, model, rows, processing_class if sets else None, config)
            batch, measured = _batches(recipe, trainer, config, with_data=bool(sets))
            step = trace_step(shadow, trainer, batch, precision, measured)
        if backend == "zero2":  # which does not cast a second model; ZeRO-3 casts it when it is loaded
            step.reference = step.reference * loaded.itemsize // dtype.itemsize
    except ValueError as err:
        raise RecipeError([str(err)], recipe.source) from err
    args, gpu = recipe.training, _gpu(recipe)
    optim = str(getattr(args.optim, "value", args.optim))
    return Plan(
        model=_model_words(recipe, config, dtype, precision),
        parameters=_parameters(model),
        trainable=sum(weight.numel for weight in step.trainable),
        rows=_rows_words(recipe, batch, with_data=bool(sets)),
        reference=_reference_words(trainer),
        optim=optim,
        backend=backend,
        processes=processes,
        memory=memory(step, backend, processes, optim, args.optim_args, mixed),
        building=step.building,
        steps=_steps(args, len(trainer.train_dataset) if sets else None, processes),
        tokens=step.tokens * args.gradient_accumulation_steps,
        throughput=recipe.run.plan_throughput,
        gpu=gpu[0],
        gpu_name=gpu[1],
        notes=notes + _notes(recipe, step, backend, optim),
    )


@contextmanager
def _writes_nothing(recipe: Recipe) -> Iterator[None]:
    """Inside, a trainer that is built makes its folder elsewhere, and no repository on the Hub."""
    args = recipe.training
    before = args.output_dir, args.push_to_hub
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir, args.push_to_hub = folder, False
        try:
            yield
        finally:
            args.output_dir, args.push_to_hub = before


def backend_of(recipe: Recipe) -> tuple[str, int]:
    """Backend and number of processes: as the recipe says, or else as this process was launched."""
    processes = recipe.run.plan_processes or recipe.training.world_size
    if recipe.run.plan_backend is not None:
        return recipe.run.plan_backend, processes
    launched = {"ZeRO-3": "zero3", "ZeRO-2": "zero2", "FSDP": "fsdp2", "whole": "ddp" if processes > 1 else "none"}
    return launched[backend()], processes


def _check_backend(recipe: Recipe, backend: str, processes: int) -> None:
    """Refuses what training would refuse under this backend."""
    if recipe.trainer_class is None:
        raise RecipeError(["`plan` is about training, and this recipe trains nothing. Leave it out."], recipe.source)
    faults = []
    if backend == "none" and processes > 1:
        faults.append(f"plan_backend: none is one process, not {processes}. Use ddp, zero2, zero3 or fsdp2.")
    with _launched_as(backend):
        faults += backend_faults(recipe)
    if faults:
        raise RecipeError(faults, recipe.source)


@contextmanager
def _launched_as(backend: str) -> Iterator[None]:
    """Inside, checks find weights sharded as the backend does it."""
    with whole_weights():
        if backend == "zero3":
            config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
            hf_deepspeed.set_hf_deepspeed_config(config)
        if backend == "fsdp2":
            os.environ[FSDP_VARIABLE] = "true"
        yield
        os.environ.pop(FSDP_VARIABLE, None)


def _config(recipe: Recipe) -> PreTrainedConfig:
    model = recipe.model
    try:
        return load_config(model.model_name_or_path, model.model_revision, recipe.run.trust_remote_code)
    except (OSError, ValueError, ImportError, KeyError) as err:
        raise RecipeError([f"model_name_or_path: {err}"], recipe.source) from err


def _data(recipe: Recipe) -> tuple[Any | None, dict[str, Any], list[str]]:
    """Processor and rows by stream where both can be read, else neither, and what to say about it."""
    name, options = recipe.model.model_name_or_path, {"trust_remote_code": recipe.run.trust_remote_code}
    try:
        sets = load_streams(recipe)
    except RecipeError as err:
        return None, {}, [f"no data: {err.faults[0].splitlines()[0]}"]
    try:
        processing_class = load_processor(name, revision=recipe.model.model_revision, **options)
    except (OSError, ValueError, ImportError) as err:
        return None, {}, [f"no processor: {str(err).splitlines()[0]}"]
    if "guidance" in recipe.streams and "guidance" not in sets and "guidance" not in sets["forget"].column_names:
        return None, {}, ["the reference answers are not written yet, so no lengths are known"]
    return processing_class, {key: rows for key, rows in sets.items() if key != "preserve"}, []


def _needed(recipe: Recipe) -> list[str]:
    """The sets that the trainer wants, without those that a method makes of others or that a mask is built with."""
    derived = {"preserve", "guidance"} | (set() if recipe.run.preferred_dataset else {"preferred"})
    return [name for name in recipe.streams if name not in derived]


def _most_rows(recipe: Recipe) -> int:
    args = recipe.training
    return max([args.per_device_train_batch_size, *recipe.trainer_class.batch_sizes(args).values()])


def _batches(recipe: Recipe, trainer: Any, config: PreTrainedConfig, with_data: bool) -> tuple[dict, dict | None]:
    """A micro-batch by stream, and the rows of one pass of the Fisher diagonal where a mask is to be built."""
    args, streams = recipe.training, trainer.train_dataset.streams
    own = recipe.trainer_class.batch_sizes(args)
    leaders = trainer.train_dataset.aligned
    sizes = {name: own.get(leaders.get(name, name), args.per_device_train_batch_size) for name in streams}
    builds, at_once = args.saliency_mask in BUILT_MASKS, {"forget": args.saliency_settings().rows_at_once}
    if with_data:
        collate = StreamCollator(trainer.collator)
        measured = collate(longest_draws({"forget": streams["forget"]}, {}, at_once)) if builds else {}
        return collate(longest_draws(streams, leaders, sizes)), measured.get("forget")
    tokens, completion = recipe.run.plan_row_tokens or args.max_length, recipe.run.plan_completion_tokens
    measured = stand_in_batch(config, at_once, tokens, completion) if builds else {}
    return stand_in_batch(config, sizes, tokens, completion), measured.get("forget")


def _gpu(recipe: Recipe) -> tuple[int | None, str]:
    """Bytes of a GPU and whose they are: as the recipe says, or those of the first one seen."""
    if recipe.run.plan_gpu_memory is not None:
        return int(recipe.run.plan_gpu_memory * 2**30), "the GPU given"
    if torch.cuda.is_available():
        seen = torch.cuda.get_device_properties(0)
        return seen.total_memory, seen.name
    return None, ""


def _parameters(model: nn.Module) -> int:
    """Elements of all weights; of a packed one those that are unpacked from it."""
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    hidden = sum(module.in_features * module.out_features - module.weight.numel() for module in packed)
    return sum(value.numel() for value in model.parameters()) + hidden


def _steps(args: Any, draws: int | None, processes: int) -> int | None:
    """Optimizer steps of the run; None where neither `max_steps` nor the data say."""
    if args.max_steps > 0:
        return args.max_steps
    if draws is None:
        return None
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * processes
    return math.ceil(args.num_train_epochs * math.ceil(draws / rows))


def _model_words(recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype, precision: str) -> str:
    settings = recipe.model
    words = [*(config.architectures or [config.model_type]), str(dtype).removeprefix("torch.")]
    if settings.load_in_4bit or settings.load_in_8bit:
        words.append("linear layers in 4 bits" if settings.load_in_4bit else "linear layers in 8 bits")
    if precision in COMPUTED_IN:
        words.append(f"computed in {precision}")
    words.append(f"LoRA r {settings.lora_r}" if settings.use_peft else "full fine-tuning")
    if recipe.training.activation_checkpointing:
        words.append("activation checkpointing")
    return f"{settings.model_name_or_path} ({', '.join(words)})"


def _rows_words(recipe: Recipe, batch: dict[str, Any], with_data: bool) -> str:
    source = "the longest rows of the data" if with_data else "no data were read: rows of a given length"
    parts = [
        f"{name} {'x'.join(str(size) for size in part['input_ids'].shape)} tokens"
        f" ({int(part['completion_mask'].sum(1).max())} of completion, {int(part['num_images'].sum())} pictures)"
        for name, part in batch.items()
    ]
    times = recipe.training.gradient_accumulation_steps
    return f"{'; '.join(parts)}; {times} a step ({source})"


def _reference_words(trainer: Any) -> str:
    modes = {
        stream: "states" if hasattr(reference, "head") else trainer.reference_mode(stream)
        for stream, reference in trainer.reference.items()
    }
    words = {
        "adapter": "adapter switched off",
        "precomputed": "a number a row",
        "states": "hidden states on disk and a frozen head",
        "model": "second model",
    }
    return ", ".join(f"{stream}: {words[mode]}" for stream, mode in modes.items()) or "none"


def _notes(recipe: Recipe, step: Step, backend: str, optim: str) -> list[str]:
    notes = []
    if optim not in STATES:
        notes.append(f"the state of {optim} is not known here; that of adamw_torch stands for it")
    if optim.startswith("paged_"):
        notes.append("the optimizer's state is paged: it lies in the CPU's memory where the GPU's is full")
    if step.kept:
        notes.append("how much of the mask is salient is not known before it is made; half is assumed for the copy")
    if backend in ("zero2", "zero3"):
        notes.append("ZeRO with DeepSpeed's own bucket sizes and no offload; overlapping communication adds more")
    return notes
