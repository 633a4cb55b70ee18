"""The reference policy: the model before unlearning, in whichever form costs least.

- `adapter`: the policy with its PEFT adapter switched off; no second model.
- `precomputed`: log pi_ref(y | x), one number per row, computed once, kept on disk and looked up by row number; for a
  KL the hidden states before the output head, memory-mapped (`reference_states`).
- `model`: a second model, frozen.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from biasunlearn_trainer.completions import CompletionOutput, forward_completions
from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.models import evaluating, keeping_frozen, load_model
from biasunlearn_trainer.sharding import inference_engine, is_partitioned

MODES = ("auto", "adapter", "precomputed", "model")


class AdapterReference:
    """The policy's own base weights, under its switched-off adapter."""

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> CompletionOutput:
        """One forward pass of the reference over a stream's batch."""
        policy = model.module if hasattr(model, "module") else model
        with keeping_frozen(policy), evaluating(policy), policy.disable_adapter():
            return forward_completions(policy, batch)


class ModelReference:
    """A second, frozen model.

    Args:
        model: the reference; `of` makes a copy of a policy.
    """

    def __init__(self, model: nn.Module):
        self.model = model.eval().requires_grad_(False)
        self._engine = inference_engine(model) if is_partitioned(model) else None

    @classmethod
    def of(cls, policy: nn.Module) -> ModelReference:
        """A copy of the policy as it is now.

        Raises:
            ValueError: its weights are partitioned, so that they are loaded once more, and are not the policy's.
        """
        if not is_partitioned(policy):
            return cls(copy.deepcopy(policy))
        name = policy.config._name_or_path
        loaded = load_model(name, dtype=policy.dtype)
        if model_hash(loaded) != model_hash(policy):
            raise ValueError(
                f"Under ZeRO-3 the reference is loaded once more from {name!r}, and what lies there is not the policy "
                "as it was given. Save the policy and load it from there, or give a reference_model."
            )
        return cls(loaded)

    def output(self, model: nn.Module, batch: dict[str, Tensor]) -> CompletionOutput:
        """One forward pass of the reference over a stream's batch."""
        device = batch["input_ids"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        with torch.no_grad():
            return forward_completions(self.model, batch)


class PrecomputedReference:
    """The log pi_ref(y | x) of a stream by row number.

    Args:
        table: (n,) float32, in nats.
    """

    def __init__(self, table: Tensor):
        self.table = table

    def logps(self, index: Tensor) -> Tensor:
        """(B,) reference log-probabilities of the rows `index`."""
        self.table = self.table.to(index.device)
        return self.table[index]
