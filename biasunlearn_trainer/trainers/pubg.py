"""PUBG: ascent on what is private, guided to what the model should say instead (arXiv 2506.02541)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor, nn

from biasunlearn_trainer.completions import CompletionOutput
from biasunlearn_trainer.reference import AdapterReference
from biasunlearn_trainer.reference_states import StatesOutput
from biasunlearn_trainer.streams import align
from biasunlearn_trainer.trainers.base import RetainChoiceConfig, Rows, UnlearnConfig, UnlearnTrainer

logger = logging.getLogger(__name__)

COLUMN, PROMPT_COLUMN = "guidance", "guidance_prompt"
BUILD = "python -m biasunlearn_trainer.guidance --model MODEL --data FORGET --output DIR"


@dataclass
class PUBGConfig(RetainChoiceConfig):
    """Settings of PUBG."""

    guidance_weight: float = field(
        default=1.0, metadata={"help": "Weight of the KL on the reference answers, lambda in PUBG (the paper: 1)."}
    )
    retain_loss: str = field(
        default="none",
        metadata={
            "help": "What keeps a retain set: `nll`, `kl` (to the reference) or `none`, as PUBG has no such set.",
            "choices": ["nll", "kl", "none"],
        },
    )

    def __post_init__(self):
        if self.guidance_weight < 0:
            raise ValueError(f"`guidance_weight` must not be negative, got {self.guidance_weight}. The paper's is 1.")
        super().__post_init__()


class PUBGTrainer(UnlearnTrainer):
    """PUBG: minimise -NLL(private answers) + guidance_weight KL(p* || policy) along the reference answers.

    Each forget row has a reference answer o, in its column `guidance` or as the completion of its row in
    `guidance_dataset`. p* is the original model's next-token distribution along o, asked as it was when it gave o: with
    the row's `guidance_prompt` in place of its `prompt`. Asked plainly it would say what is private, and a KL to that
    would hold the very answer in place that the first term pushes away. A row without `guidance_prompt` has no model
    behind its answer: p* is then o itself, and the KL is its NLL.

    Args:
        model: as for `UnlearnTrainer`.
        args: as for `UnlearnTrainer`.
        forget_dataset: rows with a private completion, and `guidance` and `guidance_prompt` where they have been built.
        *positional: as for `UnlearnTrainer`.
        guidance_dataset: rows whose completions are the reference answers, matched by `pair_id` where both sets have it
            and by position otherwise; their `guidance_prompt` counts too.
        **others: as for `UnlearnTrainer`.

    Raises:
        ValueError: for forget rows without a reference answer, with the command that builds it; where there are two.

    Source: arXiv 2506.02541.
    """

    config_class: ClassVar = PUBGConfig
    aligned_streams: ClassVar = {"guidance": "forget", "guided": "forget"}

    def __init__(
        self,
        model: Any,
        args: UnlearnConfig | None = None,
        forget_dataset: Rows | None = None,
        *positional: Any,
        guidance_dataset: Rows | None = None,
        **others: Any,
    ):
        if guidance_dataset is not None and forget_dataset is not None:
            forget_dataset = with_guidance(forget_dataset, guidance_dataset)
        super().__init__(model, args, forget_dataset, *positional, **others)
        sets = self.train_dataset.streams
        asked = [prompt is not None for prompt in _column(sets["forget"].rows, PROMPT_COLUMN)]
        self._has_model_behind = torch.tensor(asked)
        logger.info("PUBG: p* is the original model's in %d of %d rows, else the answer.", sum(asked), len(asked))

    @classmethod
    def streams(cls, args: UnlearnConfig) -> tuple[str, ...]:
        """The forget set, its reference answers, and the retain set where there is a retain loss."""
        return (*super().streams(args), "guidance")

    @classmethod
    def references(cls, args: UnlearnConfig) -> dict[str, str]:
        """Whole distributions along the reference answers, and on the retain set for a KL."""
        return {"guided": "logits"} | super().references(args)

    @classmethod
    def prepare_datasets(cls, args: UnlearnConfig, datasets: dict[str, Rows | None]) -> dict[str, Rows]:
        """The reference answers as a stream of their own."""
        datasets = super().prepare_datasets(args, datasets)
        forget = datasets.get("forget", [])
        return datasets | {"guidance": replaced(forget, "completion", reference_answers(forget))}

    @classmethod
    def lay_out(cls, args: UnlearnConfig, datasets: dict[str, Rows]) -> dict[str, Rows]:
        """Lay the answers under the prompts that the original model was given beside those under the plain ones."""
        prompts = _column(datasets["forget"], PROMPT_COLUMN)
        if not any(prompt is not None for prompt in prompts):
            return datasets
        plain = _column(datasets["forget"], "prompt")
        asked = [own if prompt is None else prompt for prompt, own in zip(prompts, plain, strict=True)]
        return datasets | {"guided": replaced(datasets["guidance"], "prompt", asked)}

    def positions(self, stream: str) -> str:
        """The reference answers' own tokens; elsewhere as the settings say."""
        return "completion" if stream == "guided" else super().positions(stream)

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget`, the ascent, and `kl/guidance`."""
        ascent = -self.nll(self.forward(model, batch, "forget"))
        return {"loss/forget": ascent, "kl/guidance": self._guidance(model, batch)}

    def _guidance(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> Tensor:
        """(B,) KL(p* || policy) per token of the reference answer, in nats."""
        result = self.forward(model, batch, "guidance")
        is_asked = self._has_model_behind[batch["guidance"]["index"].cpu()].to(result.policy.device)
        nll = self.nll(result)
        if "guided" not in batch:
            return nll
        # All rows go through, so that a batch without such rows makes the same collectives as one with them.
        guided = batch["guided"]
        if isinstance(self.reference["guided"], AdapterReference):
            guided = self.with_features(model, guided)
        reference = self.reference["guided"].output(model, guided)
        _check_same_answers(result.output, reference, batch["guidance"]["index"].tolist(), self.args.max_length)
        return torch.where(is_asked, self.divergence(result, reference), nll)


def with_guidance(forget: Rows, guidance: Rows) -> Rows:
    """Put the answers of a set of their own into the columns of the forget rows.

    Raises:
        ValueError: where the forget rows have answers already, or the sets do not fit.
    """
    if any(_column(forget, COLUMN)):
        raise ValueError(
            f"The forget set has a column `{COLUMN}` and there is a guidance_dataset. Drop one of the two."
        )
    aligned = align(forget, guidance, "guidance")
    answers = [answer_text(completion) for completion in _column(aligned, "completion")]
    return replaced(replaced(forget, COLUMN, answers), PROMPT_COLUMN, _column(aligned, PROMPT_COLUMN))


def reference_answers(rows: Rows) -> list[Any]:
    """The rows' reference answers, each in the form of its row's completion: text or a message.

    Raises:
        ValueError: naming the rows without one.
    """
    answers = [text.strip() if text else "" for text in _column(rows, COLUMN)]
    missing = [row for row, text in enumerate(answers) if not text]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise ValueError(
            f"{len(missing)} of {len(rows)} forget rows have no reference answer in `{COLUMN}`: rows {shown}. PUBG "
            f"needs what to say instead. Build the column once: `{BUILD}`, or give a guidance_dataset."
        )
    return [_in_form(text, like) for text, like in zip(answers, _column(rows, "completion"), strict=True)]


def answer_text(completion: str | Sequence[dict]) -> str:
    """A completion as text, without what parts it from its prompt."""
    if isinstance(completion, str):
        return completion.strip()
    contents = [message["content"] for message in completion]
    parts = [part for content in contents for part in ([{"text": content}] if isinstance(content, str) else content)]
    return " ".join(part["text"] for part in parts if part.get("text")).strip()


def replaced(rows: Rows, column: str, values: list[Any]) -> Rows:
    """The rows with other values in a column; pictures are not touched."""
    if isinstance(rows, Dataset):
        rest = rows.remove_columns([column]) if column in rows.column_names else rows
        return rest.add_column(column, values)
    return [{**row, column: value} for row, value in zip(rows, values, strict=True)]


def _in_form(text: str, like: str | Sequence[dict]) -> str | list[dict[str, str]]:
    if isinstance(like, str):
        return (" " if like.startswith(" ") else "") + text
    return [{"role": "assistant", "content": text}]


def _column(rows: Rows, name: str) -> list[Any]:
    """A column's values; None where the rows lack it."""
    if isinstance(rows, Dataset):
        return list(rows[name]) if name in rows.column_names else [None] * len(rows)
    return [row.get(name) for row in rows]


def _check_same_answers(
    policy: CompletionOutput, reference: CompletionOutput | StatesOutput, numbers: list[int], max_length: int | None
) -> None:
    """The KL compares position by position, so both prompts must be followed by the same tokens."""
    if torch.equal(policy.targets, reference.targets) and torch.equal(policy.mask, reference.mask):
        return
    raise ValueError(
        f"Forget rows {numbers}: the reference answer has other tokens after `{PROMPT_COLUMN}` than after `prompt`. "
        f"Either max_length={max_length} cut it (raise it), or one prompt ends in a blank and the other does not."
    )
