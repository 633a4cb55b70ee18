"""What run.py measures: models and rows of given sizes, and the forms of the methods that are compared on them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from shapes import SHAPES, TEXT_SHAPES, Shape


@dataclass(frozen=True)
class Workload:
    """A model and the rows of a step.

    Attributes:
        shape: the model's sizes.
        rows: of each stream.
        tokens: of a row's text, its completion included; a picture's come on top.
        completion: tokens of the completion, EOS included.
        lora: whether adapters are trained instead of all weights.
    """

    shape: Shape
    rows: int
    tokens: int
    completion: int
    lora: bool = False

    def words(self) -> str:
        """The workload in a line."""
        shape = self.shape
        picture = f"{shape.image_tokens} image tokens and " if shape.image_tokens else ""
        return (
            f"{shape.num_layers} layers of width {shape.hidden_size}, {shape.vocab_size:,} words; {self.rows} rows a "
            f"stream of {picture}{self.tokens} tokens, {self.completion} of them completion; "
            f"{'LoRA of rank 8' if self.lora else 'full fine-tuning unless LoRA is named'}"
        )


WORKLOADS = {
    "tiny": Workload(TEXT_SHAPES["tiny"], rows=2, tokens=48, completion=8),
    "text": Workload(TEXT_SHAPES["20m"], rows=4, tokens=256, completion=16),
    "long": Workload(TEXT_SHAPES["20m"], rows=2, tokens=2048, completion=64),
    "llava": Workload(SHAPES["20m"], rows=4, tokens=64, completion=12),
    "50m": Workload(TEXT_SHAPES["50m"], rows=4, tokens=256, completion=16, lora=True),
    "7b": Workload(SHAPES["7b"], rows=4, tokens=64, completion=12, lora=True),
}


@dataclass(frozen=True)
class Form:
    """A method in one of its forms.

    Attributes:
        method: its name in the registry.
        settings: that differ from the defaults, or are named though they do not.
        equation: of naive.py, the same loss; "" where published code has no such step.
        trl: the form of TRL's `DPOTrainer` whose step is comparable: `model`, `precomputed`, `adapter`; "" for none.
        lora: whether the form is about an adapter, whatever the workload trains.
    """

    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    equation: str = ""
    trl: str = ""
    lora: bool = False


ADAPTER, ONCE, SECOND = {"reference": "adapter"}, {"reference": "precomputed"}, {"reference": "model"}
ALONE, KL = {"retain_loss": "none"}, {"retain_loss": "kl"}
FORMS = {
    "GA": Form("ga", equation="GA"),
    "GA_Diff": Form("ga_diff", equation="GA_Diff"),
    "KL_Min, hidden states": Form("kl_min", ONCE, "KL_Min"),
    "NPO, precomputed": Form("npo", ONCE | ALONE, "NPO"),
    "NPO + retain, precomputed": Form("npo", ONCE, "NPO + retain"),
    "NPO + KL, hidden states": Form("npo", ONCE | KL, "NPO + KL"),
    "NPO + KL, second model": Form("npo", SECOND | KL, "NPO + KL"),
    "SimNPO": Form("simnpo", equation="SimNPO"),
    "DPO, precomputed": Form("dpo", ONCE | ALONE, "DPO", "precomputed"),
    "DPO, second model": Form("dpo", SECOND | ALONE, "DPO", "model"),
    "DPO + retain, precomputed": Form("dpo", ONCE, "DPO + retain"),
    "PUBG": Form("pubg"),
    "BiasUnlearn, hidden states": Form("biasunlearn", ONCE, "BiasUnlearn"),
    "MMUnlearner, random mask": Form("mmunlearner", {"saliency_mask": "random"}),
    "NPO, adapter": Form("npo", ADAPTER | ALONE, "NPO", lora=True),
    "NPO + retain, adapter": Form("npo", ADAPTER, "NPO + retain", "adapter", lora=True),
    "NPO + KL, adapter": Form("npo", ADAPTER | KL, "NPO + KL", lora=True),
    "KL_Min, adapter": Form("kl_min", ADAPTER, "KL_Min", lora=True),
    "DPO, adapter": Form("dpo", ADAPTER | ALONE, "DPO", "adapter", lora=True),
}


def forms_of(workload: Workload, chosen: list[str] | None) -> Iterator[tuple[str, Form, bool]]:
    """Name, form and whether with LoRA, of the methods chosen; with LoRA there is no copy of the weights."""
    for name, form in FORMS.items():
        if chosen and form.method not in chosen and name not in chosen:
            continue
        if not (workload.lora and form.settings.get("reference") == "model"):
            yield name, form, form.lora or workload.lora
