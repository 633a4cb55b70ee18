"""KL minimisation: ascent on the forget set, near the reference on the retain set (Maini 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from biasunlearn_trainer.trainers.base import KLConfig, UnlearnConfig, UnlearnTrainer
from biasunlearn_trainer.trainers.config import check_choice

PRESETS = {"maini": ("retain", "forward"), "mmunlearner": ("forget", "reverse")}


@dataclass
class KLMinConfig(KLConfig):
    """Settings of KL minimisation."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Sets `kl_stream` and `kl_direction` together: `maini` (retain, forward: the default), "
            "`mmunlearner` (forget, reverse: eq. 17-18 as printed).",
            "choices": [*PRESETS],
        },
    )
    kl_stream: str = field(
        default="retain",
        metadata={"help": "The set on which the KL is taken (Maini 2024: retain).", "choices": ["retain", "forget"]},
    )

    def __post_init__(self):
        if self.preset is not None:
            check_choice("preset", self.preset, tuple(PRESETS))
            self.kl_stream, self.kl_direction = PRESETS[self.preset]
        check_choice("kl_stream", self.kl_stream, ("retain", "forget"))
        super().__post_init__()


class KLMinTrainer(UnlearnTrainer):
    """KL minimisation: minimise -NLL(forget) + KL(reference || policy) on the retain set.

    With `kl_stream="forget"` the KL is taken on the forget set and weighted by `retain_weight`, as it is still the
    part that retains; no retain set is used then.
    """

    config_class: ClassVar = KLMinConfig

    @classmethod
    def check_masking(cls, args: UnlearnConfig, mask: Any | None = None) -> None:
        """Refuses a mask over the ascent where the KL runs on the same forward pass and would be masked with it."""
        masked = mask is not None or args.saliency_mask is not None
        if masked and args.mask_scope == "forget" and args.kl_stream == "forget":
            raise ValueError(
                "With kl_stream='forget' a saliency mask of scope 'forget' would cover the KL too, which is there to "
                "retain. Use kl_stream 'retain', or mask_scope 'update'."
            )
        super().check_masking(args, mask)

    @classmethod
    def retain_loss(cls, args: UnlearnConfig) -> str:
        """The KL, where it is taken on the retain set."""
        return "kl" if args.kl_stream == "retain" else "none"

    @classmethod
    def references(cls, args: UnlearnConfig) -> dict[str, str]:
        """Whole distributions on the stream of the KL."""
        return {args.kl_stream: "logits"}

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget`, the ascent, with `kl/forget` where the KL is taken on the forget set."""
        result = self.forward(model, batch, "forget")
        terms = {"loss/forget": -self.nll(result)}
        if self.args.kl_stream == "forget":
            if self.args.kl_positions != "completion":
                result = self.forward(model, batch, "forget", self.args.kl_positions)
            terms["kl/forget"] = self.kl(result)
        return terms

    def weight(self, name: str) -> float:
        """`retain_weight` for the KL, on whichever set it is taken; `forget_weight` for the ascent."""
        return self.args.retain_weight if name.startswith("kl/") else self.args.forget_weight
