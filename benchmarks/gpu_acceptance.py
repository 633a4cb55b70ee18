"""Does everything hold on this GPU? A line of pass or fail for each part, in at most nine minutes.

python benchmarks/gpu_acceptance.py
python benchmarks/gpu_acceptance.py --parts methods qlora --batch 8
python benchmarks/gpu_acceptance.py --device cpu --size tiny        # the same code without a GPU

demo     the recipe of the README: the planted bias goes, knowledge stays
methods  every method at LLaVA-1.5-7B shape (random weights), bf16, LoRA: tokens a second, peak memory
qlora    NPO on the same weights in 4 bits
zero3    a recipe under recipes/accelerate/zero3.yaml, on one process
fsdp2    the same under fsdp2.yaml
resume   a run that is killed goes on and ends with the weights of one that was not
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import biasunlearn_trainer  # noqa: F401  before transformers, for torchvision beside a CPU torch

# isort: split
import torch
from backend_cases import METHODS, datasets
from backends import environment
from peft import LoraConfig
from shapes import SHAPES, Shape, make_llava, make_rows
from transformers import BitsAndBytesConfig, TrainerCallback

from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.trainers.registry import get_method

ROOT = Path(__file__).resolve().parents[1]
WARM_UP, TIMED = 2, 4
GIB = 2**30


@dataclass(frozen=True)
class Line:
    """One line of the outcome; `passed` is None for what was not run."""

    name: str
    passed: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{ {True: 'pass', False: 'FAIL', None: '----'}[self.passed] }  {self.name:<22} {self.detail}"


@dataclass(frozen=True)
class Setting:
    """Where and how large."""

    device: str
    size: str
    batch: int
    folder: Path

    @property
    def shape(self) -> Shape:
        """The sizes of the model."""
        return SHAPES[self.size]

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the weights."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16


class Clock(TrainerCallback):
    """Seconds of each step, the device's queue emptied before and after."""

    def __init__(self, device: str):
        self.device, self.seconds, self._start = device, [], 0.0

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        """Starts the clock."""
        self._start = self._now()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Stops it."""
        self.seconds.append(self._now() - self._start)


def methods(setting: Setting) -> Iterator[Line]:
    """Every method with LoRA on one model, whose adapter is taken off again after each."""
    model, processor = make_llava(setting.shape, setting.device, setting.dtype)
    for name in METHODS:
        line, model = train(setting, name, model, processor)
        yield line


def qlora(setting: Setting) -> Iterator[Line]:
    """NPO on 4-bit weights, loaded from disk as a recipe does it."""
    model, processor = make_llava(setting.shape, setting.device, setting.dtype)
    model.save_pretrained(setting.folder / "whole")
    processor.save_pretrained(setting.folder / "whole")
    del model
    _free(setting.device)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=setting.dtype)
    model = load_model(str(setting.folder / "whole"), quantization_config=config, device_map={"": setting.device})
    yield train(setting, "npo", model, load_processor(str(setting.folder / "whole")), "npo in 4 bits")[0]


def train(
    setting: Setting, method: str, model: torch.nn.Module, processor: Any, name: str | None = None
) -> tuple[Line, torch.nn.Module]:
    """A few steps of a method; returns its line and the model without the adapter."""
    _free(setting.device)
    trainer_class, config_class = get_method(method.split(",")[0])
    args = config_class(
        str(setting.folder / "out"),
        per_device_train_batch_size=setting.batch,
        max_steps=WARM_UP + TIMED,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=setting.dtype == torch.bfloat16,
        use_cpu=setting.device == "cpu",
        disable_tqdm=True,
        dataloader_num_workers=0 if setting.device == "cpu" else 4,
        reference_cache_dir=str(setting.folder / "references"),
        saliency_cache_dir=str(setting.folder / "saliency"),
        **METHODS[method] | ({"reference": "auto"} if "reference" in METHODS[method] else {}),
    )
    clock = Clock(setting.device)
    trainer = trainer_class(
        model=model,
        args=args,
        processing_class=processor,
        peft_config=LoraConfig(r=16, lora_alpha=32),
        callbacks=[clock],
        **datasets(trainer_class, args, lambda stream: make_rows(stream, setting.shape, 2 * setting.batch)),
    )
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    added = [value.detach() for key, value in trainer.model.named_parameters() if "lora_B" in key]
    moved = any(bool(value.abs().max() > 0) for value in added)
    finite = all(math.isfinite(entry["loss"]) for entry in log)
    streams = len(trainer.train_dataset.streams)
    row = trainer.collator([{**make_rows("forget", setting.shape, 1)[0], "index": 0}])
    tokens = streams * setting.batch * row["input_ids"].shape[1]
    speed = tokens / sorted(clock.seconds[WARM_UP:])[TIMED // 2]
    detail = f"{speed:>9,.0f} tokens/s, peak {_peak(setting.device)}, {streams} streams of {setting.batch} rows"
    return Line(name or method, finite and moved, detail), trainer.model.unload()


def _free(device: str) -> None:
    import gc

    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: str) -> str:
    return f"{torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if device == "cuda" else "not measured"


def demo(setting: Setting) -> Iterator[Line]:
    """The README's recipe."""
    output = setting.folder / "demo"
    done = launch(setting, None, "demo.yaml", output)
    yield outcome("demo", done, lambda: bias_is_gone(output))


def bias_is_gone(output: Path) -> tuple[bool, str]:
    """Whether the planted bias is gone and knowledge is kept, as results.json has it."""
    results = json.loads((output / "results.json").read_text())
    after = results["after"]["tasks"]["planted"]["metrics"]
    values = {name: after[name]["value"] for name in ("ambiguous", "disambiguated", "perception", "facts")}
    return min(values.values()) >= 0.9, ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def zero3(setting: Setting) -> Iterator[Line]:
    """The planted recipe under ZeRO-3."""
    yield from sharded(setting, "zero3")


def fsdp2(setting: Setting) -> Iterator[Line]:
    """The planted recipe under FSDP2, which a CPU has not."""
    if setting.device == "cpu":
        yield Line("fsdp2", None, "not measured: on a CPU accelerate puts plain DDP in its place")
        return
    yield from sharded(setting, "fsdp2", "--probes", "null")


def sharded(setting: Setting, backend: str, *words: str) -> Iterator[Line]:
    """Twenty steps of the demo, whose saved model has to be whole again."""
    output = setting.folder / backend
    done = launch(setting, backend, "demo.yaml", output, "--max_steps", "20", *words)

    def judge() -> tuple[bool, str]:
        log = [e["loss"] for e in json.loads((output / "trainer_state.json").read_text())["log_history"] if "loss" in e]
        whole = sum(value.numel() for value in load_model(str(output)).parameters())
        return log[-1] < log[0], f"loss {log[0]:.2f} -> {log[-1]:.2f} in 20 steps, {whole:,} weights saved"

    yield outcome(backend, done, judge)


def resume(setting: Setting) -> Iterator[Line]:
    """A run that is killed once it has a checkpoint, and one that is not."""
    words = ["--max_steps", "30", "--save_strategy", "steps", "--save_steps", "10", "--full_determinism", "true"]
    words += ["--probes", "null"]
    whole, broken = setting.folder / "undisturbed", setting.folder / "killed"
    done = launch(setting, None, "demo.yaml", whole, *words)
    victim = subprocess.Popen(
        command(setting, None, "demo.yaml", broken, *words), env=variables(setting, None), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while victim.poll() is None and not (broken / "checkpoint-10" / "trainer_state.json").is_file():
        time.sleep(0.05)
    if victim.poll() is None:
        os.killpg(victim.pid, signal.SIGKILL)
    victim.wait()
    again = launch(setting, None, "demo.yaml", broken, *words, "--resume_from_checkpoint", "true")

    def judge() -> tuple[bool, str]:
        from safetensors.torch import load_file

        one, other = (load_file(folder / "model.safetensors") for folder in (whole, broken))
        difference = max((one[name].float() - other[name].float()).abs().max().item() for name in one)
        return difference == 0, f"largest difference of a weight after SIGKILL and resume: {difference:.1e}"

    yield outcome("resume", again if done.returncode == 0 else done, judge)


def command(setting: Setting, backend: str | None, recipe: str, output: Path, *words: str) -> list[str]:
    """How a recipe is launched: by accelerate with its config file; DeepSpeed on a CPU needs torchrun."""
    if setting.device == "cpu":
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--standalone"]
        start = start if backend else start[:1]
        words = (*words, "--use_cpu", "true")
    else:
        file = ROOT / "recipes" / "accelerate" / f"{backend or 'single_gpu'}.yaml"
        start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "1"]
        start += ["--mixed_precision", "no"]
    run = [str(ROOT / "recipes" / "run.py"), str(ROOT / "recipes" / recipe), "--output_dir", str(output)]
    return [*start, *run, *words]


def variables(setting: Setting, backend: str | None) -> dict[str, str]:
    """The environment of a launch."""
    return {**os.environ, **(environment(backend, "cpu") if setting.device == "cpu" else {}), "HF_HUB_OFFLINE": "1"}


def launch(
    setting: Setting, backend: str | None, recipe: str, output: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    """Runs a recipe to its end."""
    line = command(setting, backend, recipe, output, *words)
    return subprocess.run(line, env=variables(setting, backend), capture_output=True, text=True, check=False)


def outcome(name: str, done: subprocess.CompletedProcess[str], judge: Callable[[], tuple[bool, str]]) -> Line:
    """The line of a launch: what it ended with, or what its results say."""
    if done.returncode:
        return Line(name, False, f"exit status {done.returncode}: {' | '.join(done.stderr.splitlines()[-3:])[-300:]}")
    return Line(name, *judge())


PARTS = {"demo": demo, "methods": methods, "qlora": qlora, "zero3": zero3, "fsdp2": fsdp2, "resume": resume}


def main() -> int:
    """Runs the parts and prints their lines as they come; 1 where one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--size", choices=SHAPES, default="7b")
    parser.add_argument("--batch", type=int, default=4, help="rows of each stream in a step")
    parser.add_argument("--minutes", type=float, default=9.0, help="parts that would begin later are not run")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("this machine has no GPU; --device cpu --size tiny runs the same code")
    started, failed = time.monotonic(), 0
    where = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    today = time.strftime("%Y-%m-%d")
    print(f"{where}, LLaVA of shape {arguments.size}, torch {torch.__version__}, {today}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        setting = Setting(arguments.device, arguments.size, arguments.batch, Path(folder))
        for part in arguments.parts:
            minutes = (time.monotonic() - started) / 60
            if minutes > arguments.minutes:
                print(Line(part, None, f"not run: {minutes:.1f} of {arguments.minutes} minutes were over"), flush=True)
                continue
            for line in PARTS[part](setting):
                failed += line.passed is False
                print(line, flush=True)
    print(f"{(time.monotonic() - started) / 60:.1f} minutes, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
