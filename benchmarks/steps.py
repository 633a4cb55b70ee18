"""Steps, forward and backward without an optimizer: of the library's trainers, and of what they are compared with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import naive
import torch
from backend_cases import datasets
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from shapes import make_llama, make_llava, make_rows
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer
from workloads import Form, Workload

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import lora_targets
from biasunlearn_trainer.plan.trace import held_tensors
from biasunlearn_trainer.trainers.registry import get_method

IMAGE_PLACEHOLDER, RANK = len("<image>"), 8


@dataclass
class Step:
    """A step that can be taken again and again.

    Attributes:
        loss: what it minimises; forward passes only.
        model: whose gradients it takes.
        batch: tensors that the step reads.
        held: tensors that are there beside the model's weights, such as a second model's.
        precision: a context in which the loss is taken.
    """

    loss: Callable[[], Tensor]
    model: nn.Module
    batch: list[Tensor]
    held: list[Tensor] = field(default_factory=list)
    precision: Callable[[], Any] = nullcontext

    def __call__(self) -> Tensor:
        """Forward and backward; returns the loss."""
        with self.precision():
            loss = self.loss()
        loss.backward()
        self.model.zero_grad()
        return loss.detach()


class Bench:
    """Makes the steps of a workload. Those that change nothing about the model share it.

    Args:
        workload: what to measure.
        device: `cpu` or `cuda`.
        folder: for what trainers write.
    """

    def __init__(self, workload: Workload, device: str, folder: str):
        self.workload, self.device, self.folder = workload, device, folder
        self.dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self._models: dict[bool, nn.Module] = {}
        self._references: dict[bool, nn.Module] = {}
        _, self.processing_class = self._made()

    def _made(self) -> tuple[nn.Module, Any]:
        make = make_llava if self.workload.shape.image_tokens else make_llama
        return make(self.workload.shape, self.device, self.dtype)

    def fresh(self, lora: bool) -> nn.Module:
        """A model of its own."""
        model = self._made()[0]
        return get_peft_model(model, adapter(model)) if lora else model

    def model(self, lora: bool) -> nn.Module:
        """The one that is shared."""
        if lora not in self._models:
            self._models[lora] = self.fresh(lora)
        return self._models[lora]

    def rows(self, stream: str, number: int) -> list[dict]:
        """Rows of the workload's lengths; of a plain text a byte is a token."""
        work = self.workload
        prompt = work.tokens - work.completion + (IMAGE_PLACEHOLDER if work.shape.image_tokens else 0)
        return make_rows(stream, work.shape, number, prompt, work.completion - 1)

    def precision(self) -> Any:
        """bfloat16 weights with float32 adapters are computed with as mixed precision has it."""
        return nullcontext() if self.device == "cpu" else torch.autocast(self.device, dtype=self.dtype)

    def step(self, loss: Callable[[], Tensor], model: nn.Module, batch: Mapping, held: list[Tensor]) -> Step:
        """A step whose model is in training mode."""
        model.train()
        return Step(loss, model, list(_tensors(batch)), held, self.precision)

    def ours(self, form: Form, lora: bool) -> tuple[Step, dict[str, Any], dict[str, Tensor]]:
        """A trainer's step with reference and mask ready, its batch by stream, and that of all the policy's rows."""
        trainer_class, config_class = get_method(form.method)
        args = config_class(
            self.folder, per_device_train_batch_size=self.workload.rows, max_steps=100,
            reference_cache_dir=f"{self.folder}/references", saliency_cache_dir=f"{self.folder}/saliency",
            **self._quiet(), **form.settings,
        )  # fmt: skip
        masked = args.saliency_mask is not None
        trainer = trainer_class(
            model=self.fresh(lora) if masked else self.model(lora),
            args=args,
            processing_class=self.processing_class,
            **datasets(trainer_class, args, lambda stream: self.rows(stream, 2 * self.workload.rows)),
        )
        trainer.prepare_reference()
        trainer.prepare_saliency()
        draws = [trainer.train_dataset[draw] for draw in range(self.workload.rows)]
        batch = trainer._prepare_inputs(trainer.data_collator(draws))
        arranged = trainer.arrange(batch)
        read = [row for stream in arranged if stream != "guided" for draw in draws for row in draw[stream]]
        together = trainer._prepare_inputs(trainer.collator(read))
        step = self.step(
            lambda: trainer.compute_loss(trainer.model, batch), trainer.model, batch, held_tensors(trainer)
        )
        return step, arranged, together

    def plain(self, lora: bool, batch: dict[str, Tensor]) -> Step:
        """Supervised fine-tuning as `transformers.Trainer` does it: logits of all positions."""
        model = self.model(lora)
        trainer = Trainer(model, TrainingArguments(self.folder, **self._quiet()))
        labels = batch["input_ids"].masked_fill(~batch["completion_mask"].bool(), -100)
        inputs = {name: value for name, value in batch.items() if name not in naive.NOT_FOR_THE_MODEL}
        return self.step(lambda: trainer.compute_loss(model, {**inputs, "labels": labels}), model, batch, [labels])

    def floor(self, lora: bool, batch: dict[str, Tensor]) -> Step:
        """The least that fine-tuning can cost: one forward pass for all rows, its head on completion positions."""
        model = self.model(lora)
        return self.step(lambda: -forward_completions(model, batch).logps.mean(), model, batch, [])

    def naive(self, equation: str, lora: bool, batch: dict[str, Any]) -> Step:
        """The same loss by the code of naive.py."""
        model, reference, held = self.model(lora), None, []
        if equation not in naive.WITHOUT_REFERENCE:
            if lora not in self._references:
                self._references[lora] = copy.deepcopy(model).eval().requires_grad_(False)
            reference = self._references[lora]
            held = [*reference.parameters()]
        return self.step(lambda: naive.EQUATIONS[equation](model, reference, batch).mean(), model, batch, held)

    def trl(self, form: str) -> Step:
        """A step of TRL's `DPOTrainer` on the same pairs, without checkpointing, which it has on by default."""
        pairs = zip(*(self.rows(stream, self.workload.rows) for stream in ("preferred", "forget")), strict=True)
        rows = [{"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in pairs]
        model = self._made()[0]
        args = DPOConfig(
            self.folder, per_device_train_batch_size=self.workload.rows, gradient_checkpointing=False, bf16=False,
            max_length=None, precompute_ref_log_probs=form == "precomputed", **self._quiet(),
        )  # fmt: skip
        trainer = DPOTrainer(
            model,
            ref_model=copy.deepcopy(model) if form == "model" else None,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.processing_class,
            peft_config=adapter(model) if form == "adapter" else None,
        )
        batch = trainer._prepare_inputs(trainer.data_collator([*trainer.train_dataset]))
        held = [*trainer.ref_model.parameters()] if form == "model" else []
        return self.step(lambda: trainer.compute_loss(trainer.model, batch), trainer.model, batch, held)

    def _quiet(self) -> dict[str, Any]:
        return {"report_to": [], "use_cpu": self.device == "cpu", "disable_tqdm": True}


def adapter(model: nn.Module) -> LoraConfig:
    """An adapter of rank 8 on all linear layers of the language model."""
    return LoraConfig(r=RANK, target_modules=lora_targets(model, ["language_model"], None))


def _tensors(batch: Mapping[str, Any]) -> Any:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor):
            yield value
