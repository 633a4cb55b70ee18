"""MMUnlearner: ascent on salient weights, descent on the retain set everywhere (arXiv 2502.11051, eq. 3-7)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from biasunlearn_trainer.trainers.base import RetainConfig, UnlearnConfig, UnlearnTrainer


@dataclass
class MMUnlearnerConfig(RetainConfig):
    """Settings of MMUnlearner."""

    retain_loss: ClassVar[str] = "nll"
    saliency_mask: str | None = field(
        default="fisher",
        metadata={
            "help": "Which weights the ascent may move: `fisher` (those that matter more for the forget set than for "
            "the preserve set; the paper's), `random` (as many of each, drawn at random: the control for it), or "
            "the file of a mask."
        },
    )


class MMUnlearnerTrainer(UnlearnTrainer):
    """MMUnlearner: minimise -NLL(forget) through a saliency mask, + NLL(retain).

    The gradient is -m * dNLL(forget) + dNLL(retain), with m = 1[S_T / S_P >= threshold]: S_T is the Fisher diagonal of
    the initial model on the forget set, S_P the one on the preserve set. In the paper these are, of the people to be
    forgotten, the questions about their pictures (T), and their text questions with all questions about everybody else
    (P). Without a preserve set the retain set is P.

    With a LoRA adapter the mask lies over its B matrices, and its A matrices stay as they were drawn; full fine-tuning
    is what the paper does.

    Raises:
        ValueError: without a mask, under ZeRO-3 or FSDP, and as `UnlearnTrainer`.

    Source: arXiv 2502.11051, eq. 3-7.
    """

    config_class: ClassVar = MMUnlearnerConfig

    @classmethod
    def check_masking(cls, args: UnlearnConfig, mask: Any | None = None) -> None:
        """Says so where there is no mask: what is left then is gradient difference."""
        if mask is None and args.saliency_mask is None:
            raise ValueError(
                "MMUnlearner needs a `saliency_mask`: 'fisher', 'random' or a file. Without one it is gradient "
                "difference (method ga_diff)."
            )
        super().check_masking(args, mask)

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget`: the mean log-probability of the completion's tokens."""
        return {"loss/forget": -self.nll(self.forward(model, batch, "forget"))}
