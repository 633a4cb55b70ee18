"""The naive way of published unlearning code: a deep-copied reference run at every step, a forward pass for each set,
and a float32 log-softmax over the whole vocabulary at every position.

Nothing here is the library's: the equations are written once more, so that equal losses mean equal work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

Batch = Mapping[str, Mapping[str, Tensor]]
NOT_FOR_THE_MODEL = ("completion_mask", "index", "num_images")


def log_softmax(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """(B, T - 1, V) log-probabilities of what may follow each token."""
    inputs = {name: value for name, value in rows.items() if name not in NOT_FOR_THE_MODEL}
    return model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)


def token_logps(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """(B, T - 1) log-probabilities of the tokens that follow; 0 where they are no completion."""
    picked = log_softmax(model, rows).gather(-1, rows["input_ids"][:, 1:, None]).squeeze(-1)
    return picked * rows["completion_mask"][:, 1:]


def per_token(values: Tensor, rows: Mapping[str, Tensor]) -> Tensor:
    """(B,) mean over completion tokens."""
    return values.sum(-1) / rows["completion_mask"][:, 1:].sum(-1)


def nll(model: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """(B,) nats per token."""
    return -per_token(token_logps(model, rows), rows)


def log_ratio(model: nn.Module, reference: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """(B,) log(pi / pi_ref) of the completions."""
    with torch.no_grad():
        before = token_logps(reference, rows).sum(-1)
    return token_logps(model, rows).sum(-1) - before


def npo(model: nn.Module, reference: nn.Module, rows: Mapping[str, Tensor], beta: float = 0.1) -> Tensor:
    """(B,) negative preference optimisation."""
    return -2 / beta * logsigmoid(-beta * log_ratio(model, reference, rows))


def simnpo(model: nn.Module, rows: Mapping[str, Tensor], beta: float = 4.5) -> Tensor:
    """(B,) NPO without a reference."""
    return -2 / beta * logsigmoid(beta * nll(model, rows))


def kl(model: nn.Module, reference: nn.Module, rows: Mapping[str, Tensor]) -> Tensor:
    """(B,) KL(ref || theta) per token: over the vocabulary at all positions, those of the completion kept."""
    with torch.no_grad():
        before = log_softmax(reference, rows)
    divergence = (before.exp() * (before - log_softmax(model, rows))).sum(-1)
    return per_token(divergence * rows["completion_mask"][:, 1:], rows)


def dpo(model: nn.Module, reference: nn.Module, batch: Batch, beta: float = 0.1) -> Tensor:
    """(B,) preference optimisation, the forget rows rejected."""
    margin = log_ratio(model, reference, batch["preferred"]) - log_ratio(model, reference, batch["forget"])
    return -logsigmoid(beta * margin)


def biasunlearn(model: nn.Module, reference: nn.Module, batch: Batch) -> Tensor:
    """(B,) the dual pathway with the paper's weights; its three sets have as many rows."""
    forget, retain = npo(model, reference, batch["forget"]), nll(model, batch["retain"])
    return 0.4 * forget + 0.4 * retain + 0.2 * kl(model, reference, batch["utility"])


EQUATIONS: dict[str, Callable[[nn.Module, nn.Module, Batch], Tensor]] = {
    "GA": lambda model, ref, batch: -nll(model, batch["forget"]),
    "GA_Diff": lambda model, ref, batch: nll(model, batch["retain"]) - nll(model, batch["forget"]),
    "KL_Min": lambda model, ref, batch: kl(model, ref, batch["retain"]) - nll(model, batch["forget"]),
    "NPO": lambda model, ref, batch: npo(model, ref, batch["forget"]),
    "NPO + retain": lambda model, ref, batch: npo(model, ref, batch["forget"]) + nll(model, batch["retain"]),
    "NPO + KL": lambda model, ref, batch: npo(model, ref, batch["forget"]) + kl(model, ref, batch["retain"]),
    "SimNPO": lambda model, ref, batch: simnpo(model, batch["forget"]) + nll(model, batch["retain"]),
    "DPO": dpo,
    "DPO + retain": lambda model, ref, batch: dpo(model, ref, batch) + nll(model, batch["retain"]),
    "BiasUnlearn": biasunlearn,
}
WITHOUT_REFERENCE = frozenset({"GA", "GA_Diff", "SimNPO"})
