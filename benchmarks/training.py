"""What a training step costs beside supervised fine-tuning on the same tokens; processor time, interleaved, one thread.

    python benchmarks/training.py --rounds 9

A step is forward and backward passes without the optimizer. The floor of fine-tuning runs the head on completion tokens
only. 19.5 M-parameter Llama of 32,000 words, 4 + 4 rows of 256 tokens, 16 of them completion.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import biasunlearn_trainer  # noqa: F401  first: it mends torchvision beside a torch for the CPU

# isort: split
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.trainers.registry import get_method

ROWS, TOKENS, COMPLETION, WORDS = 4, 256, 16, 32_000
OFF = {"dynamic_swapping": False, "early_stop": False, "keep_best": False}
# Name -> method, whether with LoRA, settings, streams of the floor that it is compared with.
CASES = {
    "KL_Min, second model": ("kl_min", False, {"reference": "model"}, 2),
    "KL_Min, hidden states": ("kl_min", False, {"reference": "precomputed"}, 2),
    "KL_Min, hidden states, plain losses": (
        "kl_min",
        False,
        {"reference": "precomputed", "fused_losses": False},
        2,
    ),
    "NPO + KL, second model": ("npo", False, {"reference": "model", "retain_loss": "kl"}, 2),
    "NPO + KL, hidden states": ("npo", False, {"reference": "precomputed", "retain_loss": "kl"}, 2),
    "BiasUnlearn, second model": ("biasunlearn", False, {"reference": "model", **OFF}, 3),
    "BiasUnlearn, hidden states": ("biasunlearn", False, {"reference": "precomputed", **OFF}, 3),
    "KL_Min LoRA, adapter off": ("kl_min", True, {"reference": "adapter"}, 2),
    "KL_Min LoRA, hidden states": ("kl_min", True, {"reference": "precomputed"}, 2),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(500))])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def rows(first: int) -> list[dict[str, str]]:
    """As many as two batches."""
    prompt, completion = " w5" * (TOKENS - COMPLETION - 1), " w7" * COMPLETION
    return [
        {"prompt": f"w{first + i}{prompt}", "completion": completion, "pair_id": str(i), "bias_type": "race"}
        for i in range(2 * ROWS)
    ]


def trainer_of(method: str, lora: bool, settings: dict[str, Any], folder: str) -> tuple[Any, dict]:
    """A trainer with its reference ready, and a batch of full rows."""
    torch.manual_seed(0)
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 8}
    trainer_class, config_class = get_method(method)
    args = config_class(
        folder, per_device_train_batch_size=ROWS, max_steps=100, report_to=[], use_cpu=True, append_eos=False,
        reference_cache_dir=f"{folder}/references", **settings,
    )  # fmt: skip
    needed = trainer_class.streams(args)
    trainer = trainer_class(
        model=LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **shape)),
        args=args,
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=8) if lora else None,
        **{f"{stream}_dataset": rows(20 * i) for i, stream in enumerate(needed)},
    )
    trainer.prepare_reference()
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in range(ROWS)])
    assert batch["forget"]["input_ids"].shape == (ROWS, TOKENS)
    trainer.model.train()
    return trainer, batch


def step_of(*case: Any) -> Callable[[], None]:
    """A step of a method."""
    trainer, batch = trainer_of(*case)

    def step() -> None:
        trainer.compute_loss(trainer.model, batch).backward()
        trainer.model.zero_grad()

    return step


def floor_of(streams: int, lora: bool, folder: str) -> Callable[[], None]:
    """A step of fine-tuning on the tokens of some streams, one backward pass for all."""
    trainer, batch = trainer_of("ga_diff", lora, {}, folder)
    inputs = [list(batch.values())[i % 2] for i in range(streams)]

    def step() -> None:
        sum(-forward_completions(trainer.model, part).logps.mean() for part in inputs).backward()
        trainer.model.zero_grad()

    return step


def main() -> None:
    """Print a table of medians and spreads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="steps of each case; the first is not counted")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        floors = {(n, lora): floor_of(n, lora, folder) for _, lora, _, n in CASES.values()}
        cases = {name: step_of(method, lora, more, folder) for name, (method, lora, more, _) in CASES.items()}
        times = defaultdict(list)
        for _ in range(rounds):
            for key, step in (floors | cases).items():
                start = time.process_time()
                step()
                times[key].append(time.process_time() - start)
    print("| step | s | against the floor of fine-tuning, median (range) |\n|---|---|---|")
    for name, (_, lora, _, streams) in CASES.items():
        ratios = [ours / theirs for ours, theirs in zip(times[name][1:], times[streams, lora][1:], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {statistics.median(times[name][1:]):.2f} | {spread} |")


if __name__ == "__main__":
    main()
