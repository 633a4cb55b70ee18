"""The cases of backends.py, and the process that goes through them."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

STEPS = 4
METHODS: dict[str, dict[str, Any]] = {
    "ga": {},
    "ga_diff": {},
    "ga_diff, image features": {"cache_image_features": True, "trainable_groups": ["language_model"]},
    "kl_min": {"reference": "model"},
    "kl_min, hidden states": {"reference": "precomputed"},
    "kl_min, hidden states, plain losses": {"reference": "precomputed", "fused_losses": False},
    "npo": {},
    "npo, KL retain": {"retain_loss": "kl"},
    "simnpo": {},
    "dpo": {},
    "pubg": {},
    "biasunlearn": {},
    "biasunlearn, hidden states": {"reference": "precomputed"},
    "mmunlearner": {},
    "mmunlearner, update": {"mask_scope": "update"},
}
"""Method (before the comma) and settings by the name in the table."""
CASES: dict[str, dict[str, Any]] = {
    f"{modality}, {tuning}{', checkpointing' * checkpointing}": {
        "modality": modality,
        "lora": tuning == "LoRA",
        "settings": {"activation_checkpointing": checkpointing},
    }
    for modality in ("text", "image")
    for tuning in ("full", "LoRA")
    for checkpointing in (False, True)
}
if find_spec("bitsandbytes"):
    CASES["text, QLoRA"] = {"modality": "text", "lora": True, "quantised": True, "settings": {}}


def make_models(folder: Path) -> None:
    """Saves a tiny Llama and a tiny LLaVA with random weights in `folder`."""
    from biasunlearn_trainer.testbed.architectures import make_llama, make_llava, make_processor, train_tokenizer
    from biasunlearn_trainer.testbed.recipe import LanguageModelSize, VisionModelSize

    size, vision = LanguageModelSize(), VisionModelSize()
    tokenizer = train_tokenizer([row["prompt"] + row["completion"] for row in rows("forget", "text")])
    make_llama(tokenizer, size, seed=0).save_pretrained(folder / "text")
    tokenizer.save_pretrained(folder / "text")
    make_llava(tokenizer, size, vision, seed=0).save_pretrained(folder / "image")
    make_processor(tokenizer, vision).save_pretrained(folder / "image")


def rows(stream: str, modality: str, number: int = 8) -> list[dict]:
    """Rows whose completions differ in length; of a pictured set the first show coloured noise, the last nothing."""
    import numpy as np
    from PIL import Image

    made = []
    for i in range(number):
        row = {
            "prompt": f"Who was the {stream} number {i}?",
            "completion": " The " + "tall " * (i % 3) + f"one of {stream}.",
            "pair_id": str(i),
            "bias_type": ("race", "gender")[i % 2],
            "guidance": "A person in " + "red, " * (i % 3) + "blue.",
        }
        if modality == "image" and i < 5:
            pixels = np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            row["images"] = [Image.fromarray(pixels)]
        made.append(row)
    return made


def datasets(trainer_class: type, args: Any, rows_of: Callable[[str], list[dict]]) -> dict[str, Any]:
    """A set for each stream that the method takes, and a probe that lets one bias type swap its roles."""
    if args.__class__.__name__ == "BiasUnlearnConfig":
        from biasunlearn_trainer.trainers.steering import BiasReading

        readings = {"race": BiasReading(40.0, 90.0, 500), "gender": BiasReading(70.0, 90.0, 500)}
        sets = {f"{stream}_dataset": rows_of(stream) for stream in ("forget", "retain", "utility")}
        return {**sets, "bias_probe": lambda model: readings}
    given = [stream for stream in trainer_class.streams(args) if stream != "guidance"]
    return {f"{stream}_dataset": rows_of(stream) for stream in given}


def learn(folder: Path, method: str, case: dict[str, Any], backend: str, device: str) -> list[dict] | str:
    """Trains one case; returns what was logged at each step, or why it was refused."""
    import torch
    from accelerate.state import AcceleratorState, GradientState
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    from biasunlearn_trainer.models import load_model
    from biasunlearn_trainer.trainers.registry import get_method

    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    trainer_class, config_class = get_method(method.split(",")[0])
    processes = int(os.environ.get("WORLD_SIZE", 1))
    args = config_class(
        str(folder / "out"),
        per_device_train_batch_size=2 // processes,
        gradient_accumulation_steps=2,
        max_steps=STEPS,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=device == "cpu",
        disable_tqdm=True,
        bf16=False,
        # Each launch computes its own references: it is one of the things that are compared.
        reference_cache_dir=str(folder / f"references-{backend}"),
        saliency_cache_dir=str(folder / "saliency"),
        **METHODS[method],
        **case["settings"],
    )
    assert args.world_size == processes, f"{processes} processes were launched, this one sees {args.world_size}"
    options = {}
    if case.get("quantised"):
        options = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "device_map": {"": args.device}}
    try:
        model = load_model(str(folder / case["modality"]), **options)
        torch.manual_seed(0)  # the adapter's first weights are drawn from here
        trainer = trainer_class(
            model=model,
            args=args,
            peft_config=LoraConfig(r=4) if case["lora"] else None,
            **datasets(trainer_class, args, lambda stream: rows(stream, case["modality"])),
        )
    except ValueError as err:
        return str(err)
    check_backend(trainer, backend, device)
    trainer.train()
    return [
        {key: value for key, value in entry.items() if key == "loss" or "/" in key}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def check_backend(trainer: Any, backend: str, device: str) -> None:
    """Asserts that the backend is the one that was asked for, and nothing fell back."""
    from accelerate.utils import DistributedType

    cpu_or_gpu = DistributedType.MULTI_CPU if device == "cpu" else DistributedType.MULTI_GPU
    wanted = {"": DistributedType.NO, "ddp": cpu_or_gpu, "fsdp2": DistributedType.FSDP}
    expected = wanted.get(backend, DistributedType.DEEPSPEED)
    found = trainer.accelerator.distributed_type
    assert found == expected, f"asked for {backend}, got {found}"
    if expected == DistributedType.DEEPSPEED:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        assert stage == int(backend[-1]), f"asked for {backend}, got stage {stage}"


def main() -> None:
    """Goes through the cases; the main process writes what was logged."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--backend", default="")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--cases", nargs="+")
    arguments = parser.parse_args()
    import biasunlearn_trainer  # noqa: F401  before transformers, for torchvision beside a CPU torch

    results = {}
    for method in arguments.methods:
        results[method] = {
            name: learn(arguments.folder, method, CASES[name], arguments.backend, arguments.device)
            for name in arguments.cases
        }
    if os.environ.get("RANK", "0") == "0":
        arguments.output.with_suffix(".json").write_text(json.dumps(results))
    os._exit(0)  # all is written; on a busy machine a thread of gloo may abort the interpreter's own way out


if __name__ == "__main__":
    main()
