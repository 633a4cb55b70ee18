"""What all unlearning methods share, so that a method is its equation and nothing else.

A trainer names its streams and references and returns its terms, one value per sequence. The base pairs and
collates the streams, runs the model, weighs, averages, sums and logs the terms.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, Trainer, TrainerCallback

from biasunlearn_trainer.collators import CompletionCollator, StreamCollator
from biasunlearn_trainer.completions import CompletionOutput, forward_completions
from biasunlearn_trainer.losses import nll_loss, sequence_mean, sequence_sum, token_kl
from biasunlearn_trainer.models import (
    accept_published_names,
    base_model,
    evaluating,
    freeze_groups,
    load_model,
    load_processor,
    lora_targets,
)
from biasunlearn_trainer.reference_states import StatesOutput
from biasunlearn_trainer.saliency import SaliencyMask
from biasunlearn_trainer.sharding import ForgetGradients, is_sharded, running
from biasunlearn_trainer.streams import DrawSampler, PairedStreams, dealt_batches
from biasunlearn_trainer.trainers.checkpointing import Checkpointing
from biasunlearn_trainer.trainers.config import KLConfig, RetainChoiceConfig, RetainConfig, UnlearnConfig
from biasunlearn_trainer.trainers.masking import SaliencyMasking
from biasunlearn_trainer.trainers.passes import BatchCounts, SequenceLogps, StreamPasses
from biasunlearn_trainer.trainers.publishing import HubPublishing
from biasunlearn_trainer.trainers.referring import ReferencePolicy
from biasunlearn_trainer.untouched import UntouchedWeights

__all__ = [
    "KLConfig",
    "RetainChoiceConfig",
    "RetainConfig",
    "SequenceLogps",
    "UnlearnConfig",
    "UnlearnTrainer",
]

logger = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]


class UnlearnTrainer(HubPublishing, Checkpointing, StreamPasses, SaliencyMasking, ReferencePolicy, Trainer):
    """Base of the unlearning trainers.

    A method overrides `loss_terms`, and `streams` and `references` where it needs more than the forget set. (Overriding
    `compute_loss` outright works too, the Hugging Face way.)

    Args:
        model: a name or path, or a loaded causal or image-text model.
        args: the method's configuration; its defaults where None.
        forget_dataset: rows whose completions are to be unlearned: `prompt`, `completion`, and `images` where there are
            any, in TRL's prompt-completion format, plain or conversational.
        retain_dataset: rows whose completions are to stay, for the methods that take them.
        preferred_dataset: for each forget row the answer to prefer, for the methods that take them.
        utility_dataset: rows that have nothing to do with what is unlearned, for the methods that take them.
        eval_dataset: rows, or a dict of them, on which `evaluate` reports the mean NLL.
        processing_class: the model's tokenizer or processor; loaded by the model's name where None.
        peft_config: put an adapter on the model; without `target_modules` it goes on the linear layers of
            `args.trainable_groups`.
        reference_model: another model as the reference policy.
        preserve_dataset: what a saliency mask that is built here protects; the retain set where None.
        saliency_mask: the weights that forgetting may move: a mask, its file, or `fisher` or `random` to build one;
            `args.saliency_mask` where None.
        callbacks: as in `transformers.Trainer`.
        optimizers: as in `transformers.Trainer`.

    Raises:
        ValueError: where a set that the method needs is missing, one that it does not use is given, or the reference
            does not fit the model.
    """

    config_class: ClassVar[type[UnlearnConfig]] = UnlearnConfig
    aligned_streams: ClassVar[dict[str, str]] = {}
    _tag_names: ClassVar[list[str]] = ["biasunlearn_trainer", "machine-unlearning"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: UnlearnConfig | None = None,
        forget_dataset: Rows | None = None,
        retain_dataset: Rows | None = None,
        preferred_dataset: Rows | None = None,
        utility_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        peft_config: PeftConfig | None = None,
        reference_model: str | PreTrainedModel | None = None,
        preserve_dataset: Rows | None = None,
        saliency_mask: SaliencyMask | str | os.PathLike | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
    ):
        args = args if args is not None else self.config_class(output_dir="unlearned")
        self.check_masking(args, saliency_mask)
        given = {
            "forget": forget_dataset,
            "retain": retain_dataset,
            "preferred": preferred_dataset,
            "utility": utility_dataset,
        }
        datasets = self.prepare_datasets(args, given)
        self._check_datasets(args, datasets)
        streams = self.lay_out(args, datasets)
        name = model if isinstance(model, str) else model.config._name_or_path
        model = load_model(model) if isinstance(model, str) else model
        accept_published_names(base_model(model))  # a model that was loaded elsewhere resumes, too
        processing_class = processing_class or load_processor(name)
        model = self._prepare_model(model, args, peft_config)
        if args.n_gpu > 1:
            logger.warning("Using one GPU; for %d, start with `accelerate launch`.", args.n_gpu)
            args._n_gpu = 1
        self.collator = CompletionCollator(processing_class, args.max_length, args.append_eos)
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._paired(args, streams),
            data_collator=StreamCollator(self.collator),
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Losses are normalised here, over the whole accumulated batch; the Trainer must not divide them again.
        # A subclass with a `compute_loss` of its own keeps the Trainer's usual division.
        self.loss_is_scaled_for_ga = True if type(self).compute_loss is UnlearnTrainer.compute_loss else None
        self.model_accepts_loss_kwargs = False
        self._sums: dict[str, Tensor] = {}
        self._untouched = UntouchedWeights(self.model)
        self.add_callback(ForgetGradients(self))
        self._begin_passes()
        self._begin_reference(reference_model)
        self._begin_masking(self.model, saliency_mask, preserve_dataset)

    # What a method says of itself.

    @classmethod
    def streams(cls, args: UnlearnConfig) -> tuple[str, ...]:
        """The streams that the method needs; `forget` first."""
        return ("forget", "retain") if cls.retain_loss(args) != "none" else ("forget",)

    @classmethod
    def references(cls, args: UnlearnConfig) -> dict[str, str]:
        """What the method needs of the reference, by stream: `logps`, or `logits` for whole distributions."""
        return {"retain": "logits"} if cls.retain_loss(args) == "kl" else {}

    @classmethod
    def retain_loss(cls, args: UnlearnConfig) -> str:
        """Which loss keeps the retain set: `nll`, `kl` or `none`."""
        return getattr(args, "retain_loss", "none")

    @classmethod
    def prepare_datasets(cls, args: UnlearnConfig, datasets: dict[str, Rows | None]) -> dict[str, Rows]:
        """Rows by stream, without those that were not given; a method may derive one set from another here."""
        return {name: rows for name, rows in datasets.items() if rows is not None}

    @classmethod
    def check_bias_probe(cls, args: UnlearnConfig, bias_probe: Any | None) -> None:
        """Raises a ValueError where a bias probe is given to a method that is not steered by one, or is missing."""
        if bias_probe is not None:
            raise ValueError(f"{cls.__name__} is not steered by a bias probe; leave it out, or list it among `probes`.")

    @classmethod
    def lay_out(cls, args: UnlearnConfig, datasets: dict[str, Rows]) -> dict[str, Rows]:
        """The sets as streams; a method may put others together from those that it was given.

        A stream of `aligned_streams` has a row for each row of the stream named there.
        """
        return datasets

    @classmethod
    def batch_sizes(cls, args: UnlearnConfig) -> dict[str, int]:
        """Rows of a stream in a micro-batch on each process, where it is not `per_device_train_batch_size`."""
        return {}

    def arrange(self, batch: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
        """The streams that the loss reads, made of those of the batch when the step is about to be taken."""
        return batch

    def reference_rows(self, stream: str) -> Rows:
        """The rows to which the `index` of an arranged batch points."""
        return self.train_dataset.streams[stream].rows

    def loss_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The method's equation.

        Args:
            model: the policy, wrapped as training needs it.
            batch: collated rows by stream.

        Returns:
            Terms named for the log, `loss/forget`, `kl/retain`, ..., each (B,), one value per sequence. What stands
            behind the slash is weighted by `args.<it>_weight`, then all terms are summed. A 0-dimensional term is one
            value for the micro-batch.
        """
        return self.forget_terms(model, batch) | self.retain_terms(model, batch)

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The part of the equation that unlearns."""
        raise TypeError(
            f"{type(self).__name__} defines no loss: override `forget_terms`, `loss_terms` or `compute_loss`."
        )

    def retain_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The part of the equation that keeps: NLL on the retain set, KL to the reference, or nothing."""
        kind = self.retain_loss(self.args)
        if kind == "nll":
            return {"loss/retain": self.nll(self.forward(model, batch, "retain"))}
        if kind == "kl":
            return {"kl/retain": self.kl(self.forward(model, batch, "retain", self.args.kl_positions))}
        return {}

    # What methods are made of.

    def nll(self, result: SequenceLogps) -> Tensor:
        """(B,) negative log-likelihood per token, in nats."""
        return self.token_average(-result.output.token_logps, result)

    def kl(self, result: SequenceLogps) -> Tensor:
        """(B,) Kullback-Leibler divergence between reference and policy per kept position, in nats."""
        return self.divergence(result, result.reference_output, self.args.kl_direction)

    def divergence(
        self, result: SequenceLogps, reference: CompletionOutput | StatesOutput, direction: str = "forward"
    ) -> Tensor:
        """(B,) Kullback-Leibler divergence between a given reference and the policy, as `kl`."""
        values = token_kl(result.output.logits, reference.logits_at, direction, self.args.fused_losses)
        return self.token_average(result.output.scatter(values), result)

    def token_average(self, values: Tensor, result: SequenceLogps) -> Tensor:
        """Average (B, K) token values by sequence, so that the mean over sequences is what `args.reduction` says."""
        mask = result.output.mask
        if self.args.reduction == "sequence_mean":
            return sequence_mean(values, mask)
        sequences, completion_tokens, text_tokens = self._batch_counts.streams[result.stream]
        tokens = completion_tokens if result.positions == "completion" else text_tokens
        return sequence_sum(values, mask) * sequences / tokens

    def warn_if_cut(self, presets: set[str]) -> None:
        """Warns where a batch is cut into micro-batches, for presets whose loss is one value of the whole batch."""
        if self.args.preset in presets and (self.args.gradient_accumulation_steps > 1 or self.args.world_size > 1):
            logger.warning(
                "preset=%r is nonlinear in the micro-batch: with accumulation or several processes the loss differs "
                "from that of one large batch.",
                self.args.preset,
            )

    # Loss: weigh, average over the accumulated global batch, sum, log.

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, dict[str, Tensor]],
        return_outputs: bool = False,
        num_items_in_batch: BatchCounts | None = None,
    ) -> Tensor | tuple[Tensor, dict]:
        """The weighted sum of the method's terms, normalised over the whole accumulated global batch.

        Args:
            model: the policy.
            inputs: one micro-batch, rows by stream.
            return_outputs: return the terms beside the loss.
            num_items_in_batch: the sequences and tokens of the accumulated global batch; None counts this micro-batch
                alone.
        """
        self._batch_counts = num_items_in_batch or self._count([inputs])
        batch = self.arrange(inputs)
        with self._passes_over(self._batch_counts.groups):
            terms = self.loss_terms(model, batch)
        loss = sum(self.weight(name) * self._normalised(name, term) for name, term in terms.items())
        if torch.is_grad_enabled() and not is_sharded():
            pictured = frozenset((name, "pixel_values" in part) for name, part in batch.items())
            loss = self._untouched.complete(loss, pictured)
        for name, term in terms.items():
            self.record(name, term)
        return (loss, terms) if return_outputs else loss

    def weight(self, name: str) -> float:
        """The weight of a term: `args.<stream>_weight` for what stands behind the slash, else 1."""
        return getattr(self.args, f"{name.split('/')[-1]}_weight", 1.0)

    def _normalised(self, name: str, term: Tensor) -> Tensor:
        if term.dim() == 0:
            return term / getattr(self, "current_gradient_accumulation_steps", 1)
        # Gradients are averaged over processes, so each contributes its sum times their number.
        return term.sum() / self._batch_counts.streams[name.split("/")[-1]][0] * self.args.world_size

    def record(self, name: str, values: Tensor) -> None:
        """Add values to the mean that is logged under `name`; summed over processes when the log is written."""
        values = values.detach().float()
        entry = torch.stack([values.sum(), torch.ones_like(values).sum()])
        self._sums[name] = self._sums[name] + entry if name in self._sums else entry

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the means of the terms since the last log where these are training logs."""
        if "loss" in logs and self._sums:
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[name] for name in names]), "sum")
            logs.update({name: total / count for name, (total, count) in zip(names, sums.tolist(), strict=True)})
            self._sums = {}
        super().log(logs, start_time)

    # Data.

    def _get_train_sampler(self, train_dataset: PairedStreams | None = None) -> DrawSampler:
        return DrawSampler(len(train_dataset if train_dataset is not None else self.train_dataset))

    def evaluate(
        self,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean NLL per token of the evaluation rows, `<prefix>_loss`; `<prefix>_<name>_loss` for a dict of sets."""
        eval_dataset = eval_dataset if eval_dataset is not None else self.eval_dataset
        if eval_dataset is None:
            raise ValueError(f"{type(self).__name__}: evaluate() needs an eval_dataset.")
        if isinstance(eval_dataset, dict):
            parts = {f"{metric_key_prefix}_{name}": rows for name, rows in eval_dataset.items()}
            return {k: v for prefix, rows in parts.items() for k, v in self.evaluate(rows, None, prefix).items()}
        metrics = {f"{metric_key_prefix}_loss": self._mean_nll(eval_dataset)}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _mean_nll(self, rows: Rows) -> float:
        args = self.args
        batches = dealt_batches(rows, args.per_device_eval_batch_size, args.process_index, args.world_size)
        total = torch.zeros(2, device=args.device)
        with evaluating(self.model), running(self.model) if self.deepspeed is None else nullcontext():
            for numbers, counts in batches:
                batch = self._prepare_inputs(self.collator([{**rows[i], "index": i} for i in numbers]))
                output = forward_completions(self.model, batch)
                losses = nll_loss(output.token_logps, output.mask)
                total += counts * torch.stack([losses.sum(), total.new_tensor(len(numbers))])
        total = self.accelerator.reduce(total, "sum")
        return (total[0] / total[1]).item()

    def _paired(self, args: UnlearnConfig, streams: dict[str, Rows]) -> PairedStreams:
        batch = args.per_device_train_batch_size * args.world_size
        shares = self.batch_sizes(args).items()
        return PairedStreams(
            streams,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            rows_per_step=batch * args.gradient_accumulation_steps,
            aligned=self.aligned_streams,
            multiple_of=batch if args.world_size > 1 else 1,
            rows_per_draw={name: Fraction(size, args.per_device_train_batch_size) for name, size in shares},
            length_column=args.length_column_name if args.train_sampling_strategy == "group_by_length" else None,
        )

    def _check_datasets(self, args: UnlearnConfig, datasets: dict[str, Rows]) -> None:
        """Say which sets are missing and which would not be used, all at once."""
        needed = self.streams(args)
        faults = [f"needs a {name}_dataset" for name in needed if name not in datasets]
        faults += [f"does not use a {name}_dataset" for name in datasets if name not in needed]
        if faults:
            raise ValueError(
                f"{type(self).__name__} {' and '.join(faults)}; with these settings it takes: "
                f"{', '.join(f'{name}_dataset' for name in needed)}."
            )

    # Model.

    def _prepare_model(self, model: nn.Module, args: UnlearnConfig, peft_config: PeftConfig | None) -> nn.Module:
        if isinstance(model, PeftModel):
            if peft_config is not None:
                raise ValueError("The model has an adapter already; give either that or a `peft_config`, not both.")
            if not any(parameter.requires_grad for parameter in model.parameters()):
                raise ValueError(
                    "The adapter is frozen: load it with `PeftModel.from_pretrained(..., is_trainable=True)`."
                )
            return model
        if peft_config is None:
            freeze_groups(model, args.trainable_groups, args.module_groups)
            return model
        if not getattr(peft_config, "target_modules", None):
            chosen = args.trainable_groups or ["language_model"]
            peft_config.target_modules = lora_targets(model, chosen, args.module_groups)
        if getattr(model, "is_quantized", False):
            model = prepare_model_for_kbit_training(
                model,
                use_gradient_checkpointing=args.activation_checkpointing,
                gradient_checkpointing_kwargs=args.activation_checkpointing_kwargs,
            )
        elif args.activation_checkpointing:
            model.enable_input_require_grads()  # or checkpointed blocks before the first adapter would pass no gradient
        return get_peft_model(model, peft_config)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; reference and saliency mask are made of the model as it is before any checkpoint is loaded, or are the
        checkpoint's.

        Raises:
            CheckpointError: there is nothing to continue from, or a checkpoint cannot be written.
            TrainingFault: a gradient or weight is no number.
        """
        checkpoint = self.find_checkpoint(resume_from_checkpoint)
        self.prepare_reference()
        self.prepare_saliency()
        self.known_weights = None  # from here on they are others
        return super().train(checkpoint, *args, **kwargs)
