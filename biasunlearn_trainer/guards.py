"""What ends a run before it wastes its hours: a model that collapses, numbers that are none, memory that runs out."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Mapping
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from biasunlearn_trainer.checkpoints import last_usable, step_of

logger = logging.getLogger(__name__)

PROBE = "probe/"
LOSS_PREFIXES = ("loss/", "kl/")
RETAINED_METRICS = frozenset(
    {"disambiguated", "perception", "facts", "lms", "retain_vqa", "retain_qa", "real_vqa", "real_qa"}
)
"""Metrics of what a model should still be able to do; the guard watches these among a task's metrics."""
PERPLEXITIES = frozenset({"word_perplexity", "token_perplexity"})
"""Metrics that rise when a model loses its language."""
REMEDY = (
    "Lower learning_rate, train in float32 (bf16: false, dtype: float32), or keep more (retain_weight); rows that the "
    "model gives no probability at all are another cause."
)
FEWEST_NORMS = 5


class TrainingFault(ArithmeticError):
    """Training cannot go on: a gradient or a weight is no number any more. The message says what is left."""


class CollapseGuard(TrainerCallback):
    """Warns, or stops the run, when retained abilities, the loss or the gradient leave their bounds.

    A run that is stopped writes no checkpoint of the step at which it was, so that none from before makes room for it;
    the message names the last one.

    Args:
        min_retained: lowest accepted share (0 to 1) of a retained metric's first probe; None does not look.
        max_loss: largest accepted size, in nats, of the loss and of each of its parts; None does not look.
        action: `warn` or `stop`. A loss that is NaN or infinite stops the run in both cases.
        max_perplexity: largest accepted ratio of a perplexity to its first probe; None does not look.
        max_grad_growth: largest accepted ratio of the gradient's norm, before clipping, to the median of the logged
            ones before it, once there are five; None does not look.

    Attributes:
        messages: what was said so far, in order; after a resume also what the interrupted run had said.
    """

    def __init__(
        self,
        min_retained: float | None = 0.9,
        max_loss: float | None = 50.0,
        action: str = "warn",
        max_perplexity: float | None = 2.0,
        max_grad_growth: float | None = 100.0,
    ):
        if action not in ("warn", "stop"):
            raise ValueError(f"`action` must be warn or stop, got {action!r}.")
        self.min_retained = min_retained
        self.max_loss = max_loss
        self.action = action
        self.max_perplexity = max_perplexity
        self.max_grad_growth = max_grad_growth
        self._begin()

    def _begin(self) -> None:
        self.messages: list[str] = []
        self._outside: set[str] = set()
        self._first: dict[str, float] = {}
        self._norms: list[float] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        """Goes through the records of an interrupted run, so that it judges as if there had been no interruption."""
        if state.global_step == 0:
            return
        self._begin()
        for record in state.log_history:
            self._judge_record(record, record.get("step", 0), None, args)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Mapping[str, Any], **kwargs
    ) -> None:
        """Judges every record of the log."""
        self._judge_record(logs, state.global_step, control, args)

    def _judge_record(
        self, record: Mapping[str, Any], step: int, control: TrainerControl | None, args: TrainingArguments
    ) -> None:
        for name, value in record.items():
            if name == "loss" or name.startswith(LOSS_PREFIXES):
                said = self._of_loss(name, float(value))
            elif name == "grad_norm":
                said = self._of_gradient(float(value), args)
            elif name.startswith(PROBE):
                said = self._of_probe(name, float(value))
            else:
                continue
            # It speaks once when a value leaves its bounds, and again only after it has been back inside.
            if said and name not in self._outside:
                must_stop = self.action == "stop" or not math.isfinite(float(value))
                self._say(f"step {step}: {said}", control, must_stop, args)
            (self._outside.add if said else self._outside.discard)(name)

    def _of_loss(self, name: str, value: float) -> str | None:
        if not math.isfinite(value):
            return f"{name} is {value}, the run stops. {REMEDY}"
        if self.max_loss is not None and abs(value) > self.max_loss:
            return (
                f"{name} is {value:.4g}, past the bound of {self.max_loss:g} nats (guard_max_loss): the loss runs "
                "away. Lower learning_rate, or use npo in place of ga."
            )
        return None

    def _of_gradient(self, value: float, args: TrainingArguments) -> str | None:
        if not math.isfinite(value):
            # In float16 the scaler leaves such a step out.
            return None if args.fp16 else f"grad_norm is {value}, the run stops. {REMEDY}"
        before, self._norms = self._norms, [*self._norms, value]
        if self.max_grad_growth is None or len(before) < FEWEST_NORMS:
            return None
        usual = statistics.median(before)
        if value <= self.max_grad_growth * usual:
            return None
        return (
            f"grad_norm is {value:.4g}, {value / max(usual, 1e-30):.0f} times its median of {usual:.4g} so far; the "
            f"bound is {self.max_grad_growth:g} times (guard_max_grad_growth): the gradient explodes. Lower "
            "learning_rate or max_grad_norm, or add warmup_steps."
        )

    def _of_probe(self, name: str, value: float) -> str | None:
        metric = name.rpartition("/")[2]
        shown, first = name.removeprefix(PROBE), self._first.setdefault(name, value)
        todo = "Lower learning_rate, raise retain_weight, or stop earlier."
        if metric in RETAINED_METRICS and self.min_retained is not None and value < self.min_retained * first:
            return (
                f"{shown} fell to {value:.2f} from {first:.2f} at the first probe; the bound is "
                f"{self.min_retained * first:.2f} (guard_min_retained {self.min_retained:g}). The model loses what it "
                f"should keep. {todo}"
            )
        if metric in PERPLEXITIES and self.max_perplexity is not None and not value <= self.max_perplexity * first:
            return (
                f"{shown} rose to {value:.4g} from {first:.4g} at the first probe; the bound is "
                f"{self.max_perplexity * first:.4g} (guard_max_perplexity {self.max_perplexity:g}). The model loses "
                f"its language. {todo}"
            )
        return None

    def _say(self, message: str, control: TrainerControl | None, stop: bool, args: TrainingArguments) -> None:
        if stop and control is not None:
            control.should_training_stop = True
            control.should_save = False
        if stop:
            before = last_usable(args.output_dir, thorough=False) if args.output_dir else None
            kept = f" The checkpoint before it is that of step {step_of(before)}, {before}." if before else ""
            message += f" Training stops here.{kept}"
        self.messages.append(message)
        if control is not None:  # else it was said when it happened
            logger.warning(message)


def ran_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that memory ran out: a GPU's, the machine's, or a limit on the process."""
    if isinstance(err, torch.OutOfMemoryError | MemoryError):
        return True
    said = str(err).lower()
    signs = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "alloc_failed")
    return isinstance(err, RuntimeError | OSError) and any(sign in said for sign in signs)


def memory_advice(phase: str, settings: Mapping[str, Any]) -> str:
    """Names the settings that take less memory, with the values in force, the most effective first.

    Args:
        phase: `loading`, `evaluation` or `training`.
        settings: values by key, of the recipe or of a trainer's arguments.
    """
    lines = [line for key, (phases, line) in _SAVERS.items() if phase in phases and _can_save(key, settings.get(key))]
    return "\n".join(f"  - {line.format(**settings)}" for line in lines)


# Key -> in which phases it helps, and what to say; in the order of what they usually save.
_SAVERS = {
    "eval_batch_size": (
        ("evaluation", "training"),
        "eval_batch_size: {eval_batch_size} (rows scored at once): halve it.",
    ),
    "per_device_train_batch_size": (
        ("training",),
        "per_device_train_batch_size: {per_device_train_batch_size}, gradient_accumulation_steps: "
        "{gradient_accumulation_steps}: halve the one and double the other; the losses stay the same.",
    ),
    "activation_checkpointing": (
        ("training",),
        "activation_checkpointing: {activation_checkpointing} (gradient checkpointing): true keeps a fraction of the "
        "activations for about a third more time.",
    ),
    "max_length": (
        ("training", "evaluation"),
        "max_length: {max_length} (null: rows are whole): a limit in tokens cuts the longest rows.",
    ),
    "use_peft": (("training",), "use_peft: {use_peft}: true trains a LoRA, without gradients and states for the rest."),
    "load_in_4bit": (
        ("loading", "training", "evaluation"),
        "load_in_4bit: {load_in_4bit}: with use_peft: true (QLoRA, bitsandbytes) weights take a quarter of 16 bits.",
    ),
    "dtype": (("loading", "training", "evaluation"), "dtype: {dtype}: bfloat16 takes half of float32."),
    "reference": (
        ("training",),
        "reference: {reference}: precomputed (or adapter, with LoRA) needs no second model beside the trained one.",
    ),
    "processes": (
        ("training",),
        "{processes} process(es), {backend}: with recipes/accelerate/zero3.yaml or fsdp2.yaml each keeps a part.",
    ),
}


def _can_save(key: str, value: Any) -> bool:
    """Whether a setting has anything left to give."""
    if key in ("eval_batch_size", "per_device_train_batch_size"):
        return (value or 1) > 1
    if key in ("activation_checkpointing", "use_peft", "load_in_4bit"):
        return not value
    if key == "dtype":
        return value in (None, "auto", "float32")
    return value != "precomputed" if key == "reference" else True
