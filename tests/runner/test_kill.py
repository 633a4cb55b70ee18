"""SIGKILL at any moment, then `resume_from_checkpoint: true`: the same weights, log and figures as undisturbed.

The run has all the state there is: swaps by a bias probe, a saliency mask, a precomputed reference, dropout, AdamW, a
learning rate that falls, a log that is written at other steps than checkpoints are. Before it goes on, the caches are
deleted: what it needs has to be in its own folder.
"""

import json
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from biasunlearn_trainer.checkpoints import UNFINISHED, checkpoints_in

WORDS = {"stereotype": "rude", "anti-stereotype": "kind", "unrelated": "blue"}
PHASES = {
    "training": "training",
    "saving": "while saving",
    "probe": "in a probe",
    "before": "evaluation before",
    "after": "evaluation after",
}
ATTEMPTS = 8
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos")


def items(terms) -> list[dict]:
    return [
        {
            "id": f"{term}-{k}",
            "target": term,
            "bias_type": ("gender", "race")[number % 2],
            "context": f"The {term} was BLANK {k}.",
            "sentences": [
                {"sentence": f"The {term} was {word} {k}.", "id": f"{term}{k}{label}", "gold_label": label}
                for label, word in WORDS.items()
            ],
        }
        for number, term in enumerate(terms)
        for k in range(3)
    ]


@pytest.fixture
def keys(tmp_path, tiny_llama) -> dict:
    """A biasunlearn recipe of twelve steps on made-up terms."""
    kinds = ("gender", "race")
    sets = {
        name: [
            {"prompt": "", "completion": f"Term {i} was {word}.", "bias_type": kinds[i % 2], "pair_id": str(i)}
            for i in range(10)
        ]
        for name, word in (("forget", "rude"), ("retain", "kind"))
    }
    sets["utility"] = [{"prompt": "", "completion": f"Snow falls on day {i}."} for i in range(7)]
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, terms in (("probe", ["cook", "smith"]), ("report", ["baker", "miller", "tailor", "dyer"])):
        data = {"intrasentence": items(terms), "intersentence": []}
        (tmp_path / f"{name}.json").write_text(json.dumps({"version": "1.0", "data": data}))
    return {
        "method": "biasunlearn",
        "model_name_or_path": str(tiny_llama),
        **{f"{name}_dataset": str(tmp_path / f"{name}.jsonl") for name in sets},
        "bias_probe": f"stereoset@probe={tmp_path / 'probe.json'}",
        "tasks": [f"stereoset@report={tmp_path / 'report.json'}"],
        "append_eos": False,
        "min_items": 2,
        "probe_steps": 2,
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 3e-3,
        "early_stop": False,
        "reference": "precomputed",
        "saliency_mask": "fisher",
        "logging_steps": 5,
        "save_steps": 3,
        "save_total_limit": 2,
        "case_studies": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


ADAPTED = {"use_peft": True, "lora_r": 2, "lora_dropout": 0.1}


def phase_of(stack: list[tuple[str, str]]) -> str:
    """Where a run is, by the functions that it is in."""
    if any(function in ("_save_checkpoint", "save_model") for _, function in stack):
        return "saving"
    if ("steering.py", "step") in stack:
        return "probe"
    if ("run.py", "measure") in stack:
        return "before" if ("run.py", "begin") in stack else "after"
    return "training" if any(function == "_run_epoch" for _, function in stack) else "elsewhere"


def phases(run) -> Iterator[str]:
    """Where a run is, asked again and again until it is over."""
    while run.poll() is None:
        yield phase_of(run.stack())
        time.sleep(0.002)


def kill_in(run, phase: str, moment: int) -> bool:
    """Kills a run when it has been seen `moment` times in a phase; False where it ends before."""
    for now in phases(run):
        moment -= now == phase
        if now == phase and moment <= 0:
            run.signal(signal.SIGKILL)
            return run.wait() == -signal.SIGKILL
    return False


def state_of(folder: Path, adapted: bool) -> dict:
    """What has to be the same: weights, log, figures."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {
        "weights": load_file(folder / ("adapter_model.safetensors" if adapted else "model.safetensors")),
        "log": [{key: value for key, value in record.items() if key not in TIMES} for record in history],
        "results": json.loads((folder / "results.json").read_text()),
    }


def differences(one: dict, other: dict) -> list[str]:
    """What is not the same, bit for bit."""
    names = one["weights"].keys() | other["weights"].keys()
    found = [name for name in names if not _equal(one["weights"].get(name), other["weights"].get(name))]
    for number in range(max(len(one["log"]), len(other["log"]))):
        pair = [state["log"][number] if number < len(state["log"]) else {} for state in (one, other)]
        found += [f"record {number}: {key}" for key in {**pair[0], **pair[1]} if pair[0].get(key) != pair[1].get(key)]
    figures = [[state["results"][name]["tasks"] for name in ("before", "after")] for state in (one, other)]
    return found + ["results.json"] * (figures[0] != figures[1])


def _equal(one, other) -> bool:
    return one is not None and other is not None and torch.equal(one, other)


@dataclass
class Whole:
    """A run that nobody disturbed: how it ended, and how often it was seen in each phase."""

    state: dict
    seen: Counter


@pytest.fixture
def kill_and_resume(keys, start_run, tmp_path):
    """`kill_and_resume(phase, seed, adapted)`: what lay there when it was killed, whether it ended the same."""
    undisturbed: dict[bool, Whole] = {}

    def recipe_of(name: str, adapted: bool) -> dict:
        return keys | (ADAPTED if adapted else {}) | {"output_dir": str(tmp_path / name)}

    def whole(adapted: bool) -> Whole:
        if adapted not in undisturbed:
            run = start_run(recipe_of("whole", adapted))
            seen = Counter(phases(run))
            assert run.wait() == 0, run.log.read_text()[-3000:]
            undisturbed[adapted] = Whole(state_of(tmp_path / "whole", adapted), seen)
            clear("whole", "cache")
        return undisturbed[adapted]

    def clear(*names: str) -> None:
        for name in names:
            shutil.rmtree(tmp_path / name, ignore_errors=True)

    def killed_in(phase: str, draw: random.Random, recipe: dict, seen: int) -> None:
        """A run may be faster than the undisturbed one and end before the drawn moment: then it is drawn anew."""
        for _ in range(ATTEMPTS):
            run = start_run(recipe)
            if kill_in(run, phase, draw.randint(1, seen)):
                return
            assert run.wait() == 0, run.log.read_text()[-3000:]
            clear("killed", "cache")
        pytest.fail(f"{ATTEMPTS} runs ended before they could be killed in {phase}")

    def once(phase: str, seed: int, adapted: bool) -> dict:
        expected, folder = whole(adapted), tmp_path / "killed"
        clear("killed", "cache")
        assert expected.seen[phase], f"the undisturbed run was never seen in {phase}: {expected.seen}"
        killed_in(phase, random.Random(seed), recipe_of("killed", adapted), expected.seen[phase])
        steps = [path.name.partition("-")[2] for path in checkpoints_in(folder)]
        unfinished = sorted(path.name for path in (folder / UNFINISHED).glob("*"))
        clear("cache")
        again = start_run(recipe_of("killed", adapted), "--resume_from_checkpoint", "true")
        assert again.wait() == 0, again.log.read_text()[-3000:]
        assert not (folder / UNFINISHED).exists() and not (folder / "records").exists()
        return {
            "checkpoints": steps,
            "unfinished": unfinished,
            "different": differences(expected.state, state_of(folder, adapted)),
        }

    return once


def test_a_killed_run_goes_on_as_if_nothing_had_happened(kill_and_resume):
    for seed, phase in enumerate(("training", "saving")):
        found = kill_and_resume(phase, seed, True)
        assert not found["different"], found


@pytest.mark.slow
def test_twenty_kills(kill_and_resume, capsys):
    """Four in each phase, two of LoRA and two of full fine-tuning; the table is the one of docs/resume.md."""
    rows = []
    for seed in range(20):
        phase, adapted = list(PHASES)[seed % len(PHASES)], seed % 2 == 0
        found = kill_and_resume(phase, seed, adapted)
        rows.append(f"| {seed + 1} | {'LoRA' if adapted else 'full'} | {PHASES[phase]} | ")
        rows[-1] += f"{', '.join(found['checkpoints']) or 'none'} | {', '.join(found['unfinished']) or '-'} | "
        rows[-1] += f"{'DIFFERENT' if found['different'] else 'bit-identical'} |"
        with capsys.disabled():
            print(f"\n{rows[-1]}" if seed == 0 else rows[-1], flush=True)
    assert not [row for row in rows if "DIFFERENT" in row]
