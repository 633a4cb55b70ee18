"""SimNPO: NPO without a reference policy (Fan 2024)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from biasunlearn_trainer.losses import simnpo_loss
from biasunlearn_trainer.trainers.base import RetainChoiceConfig, UnlearnTrainer
from biasunlearn_trainer.trainers.config import check_positive


@dataclass
class SimNPOConfig(RetainChoiceConfig):
    """Settings of SimNPO."""

    beta: float = field(
        default=4.5, metadata={"help": "Weight on the mean log-probability of a token (Fan 2024: 4.5)."}
    )
    delta: float = field(default=0.0, metadata={"help": "Margin inside the sigmoid, gamma in the paper (Fan 2024: 0)."})

    def __post_init__(self):
        check_positive("beta", self.beta, 4.5)
        super().__post_init__()


class SimNPOTrainer(UnlearnTrainer):
    """SimNPO: minimise -(2/beta) log sigmoid(-(beta/|y|) log pi(y|x) - delta) on forget rows, with a retain loss."""

    config_class: ClassVar = SimNPOConfig

    def forget_terms(self, model: nn.Module, batch: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """(B,) `loss/forget`."""
        result = self.forward(model, batch, "forget")
        return {"loss/forget": simnpo_loss(result.policy, result.lengths, self.args.beta, self.args.delta)}
