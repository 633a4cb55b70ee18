"""Do all methods learn the same on every backend? The losses of two processes beside those of one.

python benchmarks/backends.py                                  # DDP, ZeRO-2 and ZeRO-3 on two CPU processes
python benchmarks/backends.py --device cuda --backends ddp zero2 zero3 fsdp2
python benchmarks/backends.py --methods npo mmunlearner --backends zero2 --verbose

Tiny models with random weights, text and pictures, full fine-tuning and LoRA, with and without gradient checkpointing,
all with gradient accumulation. Each backend is one launch that goes through all cases, with the settings of its file in
recipes/accelerate. Compared are the losses and every one of their parts, at every step, with one process that takes
the same global batches. Exits with 1 where any differs by more than 1e-4. ZeRO needs `pip install deepspeed`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from backend_cases import CASES, METHODS, make_models

ROOT = Path(__file__).resolve().parents[1]
BOUND = 1e-4
BACKENDS = ("ddp", "zero2", "zero3", "fsdp2")
NAMES = {"ddp": "DDP", "zero2": "ZeRO-2", "zero3": "ZeRO-3", "fsdp2": "FSDP2"}


def environment(backend: str | None, device: str) -> dict[str, str]:
    """What `accelerate launch` would set for a file of recipes/accelerate; it starts no DeepSpeed on a CPU itself."""
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if backend is None:
        return variables
    config = yaml.safe_load((ROOT / "recipes" / "accelerate" / f"{backend}.yaml").read_text())
    if zero := config.get("deepspeed_config"):
        variables |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        variables |= {f"ACCELERATE_DEEPSPEED_{key.upper()}": str(value).lower() for key, value in zero.items()}
        if device == "cpu":
            variables["DS_ACCELERATOR"] = "cpu"
    if fsdp := config.get("fsdp_config"):
        variables["ACCELERATE_USE_FSDP"] = "true"
        variables |= {key.upper(): str(value) for key, value in fsdp.items()}
    return variables


def run(backend: str | None, processes: int, arguments: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Starts one launch; returns what its main process logged, by case."""
    output = folder / (backend or "one")
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [*launch, str(Path(__file__).with_name("backend_cases.py")), str(folder), str(output)]
    command += ["--backend", backend or "", "--device", arguments.device, "--methods", *arguments.methods]
    command += ["--cases", *arguments.cases]
    print(f"{NAMES.get(backend, 'one process')} ...", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        env={**os.environ, **environment(backend, arguments.device), "BIASUNLEARN_CACHE": f"{output}-cache"},
        capture_output=not arguments.verbose,
        text=True,
    )
    if done.returncode:
        sys.exit(f"the launch of {NAMES.get(backend, 'one process')} failed:\n{(done.stderr or '')[-4000:]}")
    return json.loads(output.with_suffix(".json").read_text())


def largest_difference(one: list[dict], many: list[dict]) -> float:
    """Over all steps and all logged parts of the loss; infinite where other parts or steps were logged."""
    if [set(step) for step in one] != [set(step) for step in many]:
        return math.inf
    return max(abs(step[key] - other[key]) for step, other in zip(one, many, strict=True) for key in step)


def table(alone: dict[str, dict], results: dict[str, dict], by_case: bool) -> tuple[str, bool]:
    """A row a method, or a case, and a column a backend; each figure is the largest difference over the row's cases."""
    lines = [f"| method | cases | {' | '.join(NAMES[name] for name in results)} |"]
    lines.append("|---" * (2 + len(results)) + "|")
    good = True
    for method, logs in alone.items():
        for cases in [[case] for case in logs] if by_case else [[*logs]]:
            figures = []
            for outcome in results.values():
                found = [outcome[method][case] for case in cases]
                pairs = [(logs[case], log) for case, log in zip(cases, found, strict=True) if isinstance(log, list)]
                differences = [largest_difference(*pair) for pair in pairs]
                good &= all(value <= BOUND for value in differences)
                refused = f" ({len(found) - len(pairs)} refused)" if 0 < len(pairs) < len(found) else ""
                figures.append(f"{max(differences):.1e}{refused}" if differences else "refused")
            lines.append(f"| {method} | {cases[0] if by_case else len(cases)} | {' | '.join(figures)} |")
    return "\n".join(lines), good


def main() -> int:
    """Runs everything, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=["ddp", "zero2", "zero3"])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--by_case", action="store_true", help="a row for each case")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="show what the launches print")
    arguments = parser.parse_args()
    if arguments.device == "cpu" and "fsdp2" in arguments.backends:
        parser.error("on a CPU accelerate replaces FSDP by plain DDP without a word, so fsdp2 needs --device cuda")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_models(folder)
        alone = run(None, 1, arguments, folder)
        results = {name: run(name, arguments.processes, arguments, folder) for name in arguments.backends}
    text, good = table(alone, results, arguments.by_case)
    logs = [log for outcome in results.values() for cases in outcome.values() for log in cases.values()]
    print(f"Largest difference of any logged part of the loss to one process, {len(arguments.cases)} cases a method:\n")
    print(text)
    for reason in sorted({log for log in logs if isinstance(log, str)}):
        print(f"\nrefused: {reason}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
