"""What all methods can be told: the fields that `UnlearnConfig` adds to `transformers.TrainingArguments`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from transformers import TrainingArguments

from biasunlearn_trainer.lengths import LENGTH_COLUMN
from biasunlearn_trainer.reference import MODES
from biasunlearn_trainer.reference_states import STATES_DTYPES
from biasunlearn_trainer.saliency import FISHERS, SCOPES, SaliencySettings

REDUCTIONS = ("sequence_mean", "token_mean")
RETAIN_LOSSES = ("nll", "kl", "none")
SAMPLING = ("random", "group_by_length")
# The masks that a run builds itself; every other value of `saliency_mask` is a file.
BUILT_MASKS = ("fisher", "random")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the nearest valid value, unless `value` is one of the choices."""
    if value not in choices:
        near = get_close_matches(str(value), choices, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}; got {value!r}.{hint}")


def check_positive(name: str, value: float, default: float) -> None:
    """Raise a ValueError unless `value` is positive."""
    if not value > 0:
        raise ValueError(f"`{name}` must be positive, got {value}. Use {default}, the paper's value.")


def liger_settings(given: dict[str, bool] | str | None) -> dict[str, bool]:
    """What liger-kernel may replace: layers, but neither the head nor the loss, which are this library's own.

    Its fused cross-entropy makes no logits, and the forward pass that it puts in a model's place fails on a choice of
    positions.

    Raises:
        ValueError: where one of the two was asked for.
    """
    given = json.loads(given) if isinstance(given, str) else given or {}
    own = ("fused_linear_cross_entropy", "cross_entropy")
    if asked := [name for name in own if given.get(name)]:
        raise ValueError(f"liger_kernel_config: {asked[0]} replaces a loss that no method here takes. Leave it out.")
    return {**given, **dict.fromkeys(own, False)}


@dataclass
class UnlearnConfig(TrainingArguments):
    """Settings that all unlearning trainers share.

    Every default that differs from `transformers.TrainingArguments` says why in its help.
    """

    max_length: int | None = field(
        default=None,
        metadata={"help": "Longest row in tokens; None keeps rows whole. Image tokens are never cut."},
    )
    append_eos: bool = field(
        default=True,
        metadata={"help": "End plain-text completions with EOS, as TRL does. Chat rows end as their template says."},
    )
    reduction: str = field(
        default="sequence_mean",
        metadata={
            "help": "How losses that average over tokens do so: `sequence_mean` (mean over a sequence's tokens, then "
            "over sequences; MMUnlearner eq. 13-14) or `token_mean` (over all tokens of the accumulated global batch).",
            "choices": list(REDUCTIONS),
        },
    )
    joint_forward: bool = field(
        default=True,
        metadata={
            "help": "Let a batch's streams go through the model together where they are about equally long and all "
            "have pictures or none: fewer and larger passes, the same terms. False: one pass for each stream."
        },
    )
    fused_losses: bool = field(
        default=True,
        metadata={
            "help": "Take log-probabilities and divergences a few positions at a time, with one tensor of the logits' "
            "size for the backward pass; false leaves it to autograd, with the same numbers in three to six of them."
        },
    )
    cache_image_features: bool = field(
        default=False,
        metadata={
            "help": "Where vision tower and connector are frozen: run them once per picture and keep what they found "
            "in the library's cache folder (LLaVA-1.5-7B: 4.7 MB a picture in 16 bits). Off: it takes that disk space, "
            "and gains nothing in a single epoch or where pictures are augmented."
        },
    )
    trainable_groups: list[str] | None = field(
        default=None,
        metadata={
            "help": "Full fine-tuning: the module groups to train (language_model, connector, vision_tower); None "
            "trains all. With an adapter, the groups that get one; None means language_model.",
        },
    )
    module_groups: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Module-name prefixes by group, for a model whose parts are not found by themselves: "
            "{language_model: [...], connector: [...], vision_tower: [...]}. None: found in the model's structure."
        },
    )
    reference: str = field(
        default="auto",
        metadata={
            "help": "Where the reference policy comes from: `adapter` (PEFT adapter switched off), `precomputed` (one "
            "number per row, computed once, kept on disk; for a KL the hidden states before the output head), `model` "
            "(a second model), or `auto` (adapter if there is one, else precomputed; for a KL a second model if the "
            "run is too short to come by every row).",
            "choices": list(MODES),
        },
    )
    reference_dtype: str | None = field(
        default=None,
        metadata={
            "help": "How a KL's precomputed hidden states are kept: `bfloat16` or `float16` halve the file of a "
            "float32 model. None: in the model's own type, exact.",
            "choices": [*STATES_DTYPES],
        },
    )
    reference_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Another model as the reference. None: the model as it was before unlearning."},
    )
    reference_cache_dir: str | None = field(
        default=None,
        metadata={"help": "Where precomputed references are kept. None: `references` in the library's cache folder."},
    )
    probe_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps between two probes, where there are any: a recipe's, or a trainer's bias probe. "
            "10 gives ten points on the curve of a 100-step run."
        },
    )
    saliency_mask: str | None = field(
        default=None,
        metadata={
            "help": "Which weights forgetting may move: `fisher` (those that matter more for the forget set than for "
            "the preserve set), `random` (as many of each weight, drawn at random: the control for it), or the file of "
            "a mask. None: all."
        },
    )
    mask_scope: str = field(
        default="forget",
        metadata={
            "help": "What the mask covers: `forget`, the gradient of the forget loss (MMUnlearner eq. 3); `update`, "
            "the whole update: other weights stay bit-identical, at the price of a second copy of them.",
            "choices": [*SCOPES],
        },
    )
    saliency_threshold: float = field(
        default=1.0,
        metadata={
            "help": "Smallest ratio of the Fisher values on forget and preserve set of a salient weight (eq. 7: 1)."
        },
    )
    saliency_fisher: str = field(
        default="per_sample",
        metadata={
            "help": "`per_sample`: mean of squared gradients of rows, the Fisher diagonal; `per_batch`: of micro-"
            "batches, as in MMUnlearner's code.",
            "choices": [*FISHERS],
        },
    )
    saliency_batch_size: int = field(
        default=4,
        metadata={
            "help": "Rows that the Fisher takes at once (MMUnlearner's code: 4). Of `per_batch` they make up a micro-"
            "batch; for `per_sample` they only set speed and memory."
        },
    )
    saliency_batched: bool = field(
        default=True,
        metadata={
            "help": "Let the `per_sample` Fisher take several rows in one backward pass. False: one backward a row, "
            "with the same result."
        },
    )
    saliency_epsilon: float = field(
        default=1e-30,
        metadata={"help": "Smallest Fisher value that is told from 0; 1e-30 is the square of a gradient of 1e-15."},
    )
    saliency_one_pass: bool = field(
        default=False,
        metadata={"help": "Hold both Fisher diagonals in memory; else the first waits in a file of 4 bytes a weight."},
    )
    saliency_seed: int = field(default=0, metadata={"help": "Which draw a `random` mask is."})
    saliency_cache_dir: str | None = field(
        default=None, metadata={"help": "Where masks are kept. None: `saliency` in the library's cache folder."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False,
        metadata={
            "help": "DDP's own search looks at one forward pass at a time and is wrong about two before one backward "
            "pass; weights that a step leaves out are found by the trainer itself."
        },
    )
    train_sampling_strategy: str = field(
        default="random",
        metadata={
            "help": "In which order rows come: `random` (new every epoch, as in the papers), or `group_by_length`: as "
            "random, with rows of like length in one optimizer step, in every stream at once, so that less is padding.",
            "choices": [*SAMPLING],
        },
    )
    length_column_name: str = field(
        default=LENGTH_COLUMN,
        metadata={
            "help": "For `group_by_length`: the column with the rows' lengths, where a set has one. Else characters "
            "are counted, and as many as 576 tokens have for a picture."
        },
    )
    remove_unused_columns: bool = field(
        default=False,
        metadata={"help": "Columns are read by name by the collator; rows must reach it whole."},
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": "Transformers' default hides NaN and infinite losses in the log; in unlearning they must show."
        },
    )

    def __post_init__(self):
        check_choice("reduction", self.reduction, REDUCTIONS)
        check_choice("reference", self.reference, MODES)
        if self.reference_dtype is not None:
            check_choice("reference_dtype", self.reference_dtype, tuple(STATES_DTYPES))
        check_choice("mask_scope", self.mask_scope, SCOPES)
        check_choice("train_sampling_strategy", self.train_sampling_strategy, SAMPLING)
        if self.length_column_name != LENGTH_COLUMN and self.train_sampling_strategy != "group_by_length":
            raise ValueError(
                f"`length_column_name` has no effect with train_sampling_strategy={self.train_sampling_strategy!r}. "
                "Set that to 'group_by_length', or leave it out."
            )
        self.saliency_settings()
        if isinstance(self.module_groups, str):
            self.module_groups = json.loads(self.module_groups)
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` would stand in the run's files. Leave it out, and run `hf auth login` or set HF_TOKEN."
            )
        if self.probe_steps < 1:
            raise ValueError(f"`probe_steps` must be at least 1, got {self.probe_steps}.")
        super().__post_init__()
        if self.use_liger_kernel:
            self.liger_kernel_config = liger_settings(self.liger_kernel_config)
        if self.activation_checkpointing:
            # Reentrant checkpointing with two forward passes before one backward is silently wrong on one process and
            # raises under DDP and ZeRO-2.
            kwargs = {**(self.activation_checkpointing_kwargs or {}), "use_reentrant": False}
            self.activation_checkpointing_kwargs = self.gradient_checkpointing_kwargs = kwargs
        self.remove_unused_columns = False

    def saliency_settings(self) -> SaliencySettings:
        """How a saliency mask is made.

        Raises:
            ValueError: where one of the values is out of range.
        """
        return SaliencySettings(
            threshold=self.saliency_threshold,
            fisher=self.saliency_fisher,
            batch_size=self.saliency_batch_size,
            batched=self.saliency_batched,
            epsilon=self.saliency_epsilon,
            one_pass=self.saliency_one_pass,
            # Rows one by one give the same sums in any order.
            seed=self.seed if self.saliency_fisher == "per_batch" else 0,
        )


@dataclass
class RetainConfig(UnlearnConfig):
    """Settings of the methods that can hold on to a retain set."""

    forget_weight: float = field(
        default=1.0, metadata={"help": "Weight of the forget loss (Liu 2022; MMUnlearner eq. 2: 1)."}
    )
    retain_weight: float = field(
        default=1.0, metadata={"help": "Weight of the retain loss, alpha in NPO (Zhang 2024: 1)."}
    )


@dataclass
class KLConfig(RetainConfig):
    """Settings of the methods that can keep the model near the reference by a Kullback-Leibler divergence."""

    kl_direction: str = field(
        default="forward",
        metadata={
            "help": "`forward`: KL(reference || policy), the usual one; `reverse`: KL(policy || reference).",
            "choices": ["forward", "reverse"],
        },
    )
    kl_positions: str = field(
        default="completion",
        metadata={
            "help": "Where the KL is taken: on `completion` tokens or on `all_text`; never on padding or images.",
            "choices": ["completion", "all_text"],
        },
    )

    def __post_init__(self):
        check_choice("kl_direction", self.kl_direction, ("forward", "reverse"))
        check_choice("kl_positions", self.kl_positions, ("completion", "all_text"))
        super().__post_init__()


@dataclass
class RetainChoiceConfig(KLConfig):
    """Settings of the methods that leave the choice of the retain loss to you."""

    retain_loss: str = field(
        default="nll",
        metadata={
            "help": "What keeps the retain set: `nll`, `kl` (to the reference) or `none`.",
            "choices": [*RETAIN_LOSSES],
        },
    )

    def __post_init__(self):
        check_choice("retain_loss", self.retain_loss, RETAIN_LOSSES)
        if self.retain_loss != "kl" and (self.kl_direction, self.kl_positions) != ("forward", "completion"):
            raise ValueError(
                f"`kl_direction` and `kl_positions` have no effect with retain_loss={self.retain_loss!r}. "
                "Set retain_loss to 'kl', or leave them out."
            )
        super().__post_init__()
