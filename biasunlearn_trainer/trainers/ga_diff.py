"""Gradient difference: ascent on the forget set, descent on the retain set (Liu 2022; MMUnlearner eq. 2, 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from biasunlearn_trainer.trainers.base import RetainConfig, UnlearnTrainer


@dataclass
class GADiffConfig(RetainConfig):
    """Settings of gradient difference: the weights of its two terms."""

    retain_loss: ClassVar[str] = "nll"


class GADiffTrainer(UnlearnTrainer):
    """Gradient difference: minimise -NLL(forget) + NLL(retain), both in every step."""

    config_class: ClassVar = GADiffConfig

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget`: the mean log-probability of the completion's tokens."""
        return {"loss/forget": -self.nll(self.forward(model, batch, "forget"))}
