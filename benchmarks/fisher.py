"""What the per-sample Fisher costs beside the per-batch one: time and memory.

python benchmarks/fisher.py                              # one CPU thread, a few minutes
python benchmarks/fisher.py --cases deep-64 llava --rounds 20
python benchmarks/fisher.py --device cuda --dtype bfloat16

Models with random weights and rows of random tokens, 16 of them completion tokens, four rows a micro-batch. Of each
case all ways are run in turn, round after round, and every figure is the median over rounds of the ratio to the
per-batch Fisher of the same round, with its quartiles. On a CPU time is the process's own CPU time, so that a busy
machine disturbs it little. Memory is the peak of tensor bytes over what is needed: weights, a float32 sum of each, the
largest gradient, and what a forward pass of one micro-batch keeps.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import biasunlearn_trainer  # noqa: F401  before transformers: mends torchvision beside a torch for the CPU

import torch  # isort: skip
from peft import LoraConfig, get_peft_model
from rounds import Ratio, interleaved, ratio
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import nll_loss
from biasunlearn_trainer.plan.meter import TensorBytes
from biasunlearn_trainer.saliency.fisher import PerSampleFisher, add_squared_gradients, empty_sums

BATCH_SIZE, NUM_COMPLETION = 4, 16
BOUND = 1.3
WAYS = ("per batch", "per sample", "one by one")
NUM_IMAGE_TOKENS, IMAGE_SIZE, IMAGE_TOKEN = 576, 336, 3
Row = Mapping[str, Tensor]


def wide() -> nn.Module:
    """19.6 M weights, five sixths of them in embedding and head of 32,000 words."""
    return LlamaForCausalLM(LlamaConfig(**_language_model(256, 4, 32_000)))


def deep() -> nn.Module:
    """20.8 M weights, six sevenths of them in layers."""
    return LlamaForCausalLM(LlamaConfig(**_language_model(384, 10, 4_000)))


def llava() -> nn.Module:
    """22 M weights; 576 image tokens."""
    vision = CLIPVisionConfig(
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=14,
    )
    text = LlamaConfig(**_language_model(256, 4, 32_000))
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE_TOKEN,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return LlavaForConditionalGeneration(config)


def llava_lora() -> nn.Module:
    """The same with adapters of rank 8 in the language model."""
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    model = get_peft_model(llava(), LoraConfig(r=8, target_modules=targets))
    for name, value in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(value, std=0.02)
    return model


def _language_model(hidden_size: int, num_layers: int, vocab_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": hidden_size * 8 // 3,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "vocab_size": vocab_size,
    }


# By name: the model, and the tokens of a row.
CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    **{f"wide-{length}": (wide, length) for length in (64, 128, 256)},
    **{f"deep-{length}": (deep, length) for length in (64, 128, 256)},
    "llava": (llava, NUM_IMAGE_TOKENS + 48),
    "llava-lora": (llava_lora, NUM_IMAGE_TOKENS + 48),
}


def make_rows(length: int, pictured: bool) -> list[Row]:
    """Rows of random tokens, the last ones of a completion."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(BATCH_SIZE):
        row = {"input_ids": torch.randint(4, 4_000, (length,), generator=generator)}
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        row["completion_mask"] = torch.arange(length) >= length - NUM_COMPLETION
        row["num_images"] = torch.tensor(int(pictured))
        if pictured:
            row["input_ids"][:NUM_IMAGE_TOKENS] = IMAGE_TOKEN
            row["pixel_values"] = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        rows.append(row)
    return rows


def ways(model: nn.Module, rows: Sequence[Row], sums: Mapping[str, Tensor]) -> dict[str, Callable[[], None]]:
    """By name, what adds the rows to `sums`."""
    weight = next(model.parameters())

    def collate(chosen: Sequence[Row]) -> dict[str, Tensor]:
        batch = {key: torch.stack([row[key] for row in chosen]).to(weight.device) for key in chosen[0]}
        return {key: value.to(weight.dtype) if value.is_floating_point() else value for key, value in batch.items()}

    per_sample = PerSampleFisher(model, collate, sums)
    per_sample.add(rows)  # takes them both ways, once

    def one_by_one() -> None:
        for row in rows:
            add_squared_gradients(model, collate([row]), sums)

    found = (lambda: add_squared_gradients(model, collate(rows), sums), lambda: per_sample.add(rows), one_by_one)
    return dict(zip(WAYS, found, strict=True))


def peak(way: Callable[[], None], model: nn.Module, sums: Mapping[str, Tensor]) -> float:
    """Peak of tensor bytes."""
    with TensorBytes(*model.parameters(), *sums.values()) as meter:
        way()
    return meter.peak


def needed(model: nn.Module, rows: Sequence[Row], sums: Mapping[str, Tensor]) -> float:
    """Weights, sums, the largest gradient, and what the forward pass of one micro-batch keeps; in bytes."""
    weights = list(model.parameters())

    def forward() -> None:
        batch = {key: torch.stack([row[key] for row in rows]).to(weights[0].device) for key in rows[0]}
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(weights[0].dtype)
        output = forward_completions(model, batch)
        nll_loss(output.token_logps, output.mask).sum()

    return peak(forward, model, sums) + max(value.nbytes for value in weights if value.requires_grad)


@dataclass(frozen=True)
class Outcome:
    """A line of the table.

    Attributes:
        case: its name.
        milliseconds: of the per-batch Fisher on four rows.
        time: against it, by the way.
        memory: peak over what is needed, by the way.
    """

    case: str
    milliseconds: float
    time: dict[str, Ratio]
    memory: dict[str, float]

    def __str__(self) -> str:
        cells = [self.case, f"{self.milliseconds:.0f} ms", *(str(self.time[way]) for way in WAYS[1:])]
        return f"| {' | '.join([*cells, *(f'{self.memory[way]:.2f}' for way in WAYS[:2])])} |"


def measure(case: str, arguments: argparse.Namespace) -> Outcome:
    """All ways on one model and its rows."""
    make, length = CASES[case]
    torch.manual_seed(0)
    model = make().to(arguments.device, getattr(torch, arguments.dtype)).eval()
    rows, sums = make_rows(length, make in (llava, llava_lora)), empty_sums(model)
    alternatives = ways(model, rows, sums)
    allowed = needed(model, rows, sums)
    times = interleaved(alternatives, arguments.rounds, arguments.device)
    return Outcome(
        case,
        1000 * statistics.median(times[WAYS[0]].values()),
        {way: ratio(times[way], times[WAYS[0]]) for way in WAYS[1:]},
        {way: peak(alternatives[way], model, sums) / allowed for way in WAYS[:2]},
    )


def outcomes(arguments: argparse.Namespace) -> Iterator[Outcome]:
    """Every case."""
    for case in arguments.cases:
        yield measure(case, arguments)


def header() -> str:
    """The first lines of the table."""
    return f"| case | per batch, 4 rows | per sample | one by one | peak, per batch | peak, per sample |\n{'|---' * 6}|"


def main() -> int:
    """Prints the table; 1 where a ratio is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(header())
    found = []
    for outcome in outcomes(arguments):
        found.append(outcome)
        print(outcome, flush=True)
    return int(any(outcome.time[WAYS[1]].median > BOUND for outcome in found))


if __name__ == "__main__":
    raise SystemExit(main())
