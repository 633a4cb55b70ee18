"""Gradient ascent on the forget set (Thudi 2022; MMUnlearner eq. 15)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from biasunlearn_trainer.trainers.base import UnlearnConfig, UnlearnTrainer


@dataclass
class GAConfig(UnlearnConfig):
    """Settings of gradient ascent; it has none of its own."""


class GATrainer(UnlearnTrainer):
    """Gradient ascent: minimise + mean_t log pi(y_t | x, y_<t) on the forget set.

    It has no floor: left to run, it destroys the model. It is here as the baseline that every paper compares with.
    """

    config_class: ClassVar = GAConfig

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget`: the mean log-probability of the completion's tokens."""
        return {"loss/forget": -self.nll(self.forward(model, batch, "forget"))}
