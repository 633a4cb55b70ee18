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
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import biasunlearn_trainer  # noqa: F401  before transformers: mends torchvision beside a torch for the CPU

import torch  # isort: skip
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.losses import nll_loss
from biasunlearn_trainer.plan.meter import TensorBytes
from biasunlearn_trainer.saliency.fisher import PerSampleFisher, add_squared_gradients, empty_sums

BATCH_SIZE, NUM_COMPLETION = 4, 16
BOUND = 1.3
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

    return {
        "per batch": lambda: add_squared_gradients(model, collate(rows), sums),
        "per sample": lambda: per_sample.add(rows),
        "one by one": one_by_one,
    }


def seconds(way: Callable[[], None], device: str) -> float:
    """CPU time of the process, or time until the GPU is done."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    way()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - start


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


def measure(case: str, arguments: argparse.Namespace) -> tuple[str, float]:
    """A line of the table, and the ratio per sample / per batch."""
    make, length = CASES[case]
    torch.manual_seed(0)
    model = make().to(arguments.device, getattr(torch, arguments.dtype)).eval()
    rows, sums = make_rows(length, make in (llava, llava_lora)), empty_sums(model)
    alternatives = ways(model, rows, sums)
    allowed = needed(model, rows, sums)
    memory = {name: peak(way, model, sums) / allowed for name, way in alternatives.items()}
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for number in range(arguments.rounds + 1):
        names = [*alternatives]
        for name in names[number % 3 :] + names[: number % 3]:
            taken = seconds(alternatives[name], arguments.device)
            if number:  # the first round warms up
                times[name].append(taken)
    ratios = {name: [t / base for t, base in zip(times[name], times["per batch"], strict=True)] for name in times}
    quartiles = {name: statistics.quantiles(values, n=4) for name, values in ratios.items()}
    cells = [case, f"{statistics.median(times['per batch']) * 1000:.0f} ms"]
    cells += [f"{q[1]:.2f} ({q[0]:.2f}-{q[2]:.2f})" for name, q in quartiles.items() if name != "per batch"]
    cells += [f"{memory[name]:.2f}" for name in ("per batch", "per sample")]
    return f"| {' | '.join(cells)} |", quartiles["per sample"][1]


def main() -> int:
    """Prints the table; 1 where a ratio is above the bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], metavar="CASE")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| case | per batch, 4 rows | per sample | one by one | peak, per batch | peak, per sample |")
    print("|---" * 6 + "|")
    worst = -math.inf
    for case in arguments.cases:
        line, ratio = measure(case, arguments)
        worst = max(worst, ratio)
        print(line, flush=True)
    return int(worst > BOUND)


if __name__ == "__main__":
    raise SystemExit(main())
