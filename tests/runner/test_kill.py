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
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from biasunlearn_trainer.checkpoints import UNFINISHED, checkpoints_in

WORDS = {"stereotype": "rude", "anti-stereotype": "kind", "unrelated": "blue"}
PHASES = ("before", "training", "probe", "saving", "after")
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


def kill_in(run, phase: str, draw: random.Random) -> str:
    """Kills a run a random while after it has come to a phase for a random time; returns where it was last seen."""
    visits, last = draw.randint(1, {"training": 9, "probe": 4, "saving": 3}.get(phase, 1)), "elsewhere"
    while run.poll() is None:
        now = phase_of(run.stack())
        visits -= now == phase and last != phase
        last = now
        if now == phase and visits <= 0:
            time.sleep(draw.random() * 0.02)
            last = phase_of(run.stack()) if run.poll() is None else last
            run.signal(signal.SIGKILL)
            run.wait()
            return last
        time.sleep(draw.random() * 0.004)
    return "over"


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


@pytest.fixture
def kill_and_resume(keys, start_run, tmp_path):
    """`kill_and_resume(phase, seed, adapted)`: where it was killed, what lay there, whether it ended the same."""
    whole: dict[bool, dict] = {}

    def undisturbed(adapted: bool) -> dict:
        if adapted not in whole:
            folder = tmp_path / f"whole{adapted}"
            more = ADAPTED if adapted else {}
            run = start_run(keys | more | {"output_dir": str(folder)})
            assert run.wait() == 0, run.log.read_text()[-3000:]
            whole[adapted] = state_of(folder, adapted)
            shutil.rmtree(tmp_path / "cache")
        return whole[adapted]

    def once(phase: str, seed: int, adapted: bool) -> dict:
        expected, folder = undisturbed(adapted), tmp_path / f"killed{seed}"
        recipe = keys | (ADAPTED if adapted else {}) | {"output_dir": str(folder)}
        run = start_run(recipe)
        where = kill_in(run, phase, random.Random(seed))
        assert run.wait() == -signal.SIGKILL, run.log.read_text()[-3000:]
        steps = [path.name.partition("-")[2] for path in checkpoints_in(folder)]
        unfinished = sorted(path.name for path in (folder / UNFINISHED).glob("*"))
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)
        again = start_run(recipe, "--resume_from_checkpoint", "true")
        assert again.wait() == 0, again.log.read_text()[-3000:]
        assert not (folder / UNFINISHED).exists() and not (folder / "records").exists()
        return {
            "phase": where,
            "checkpoints": steps,
            "unfinished": unfinished,
            "different": differences(expected, state_of(folder, adapted)),
        }

    return once


def test_a_killed_run_goes_on_as_if_nothing_had_happened(kill_and_resume):
    for seed, phase in ((7, "training"), (8, "saving")):
        found = kill_and_resume(phase, seed, True)
        assert not found["different"], found


@pytest.mark.slow
def test_twenty_kills(kill_and_resume, capsys):
    """Four in each phase, of LoRA and of full fine-tuning; the table is the one of docs/resume.md."""
    rows = []
    for seed in range(20):
        adapted = seed % 2 == 0
        found = kill_and_resume(PHASES[seed % len(PHASES)], seed, adapted)
        rows.append(f"| {seed + 1} | {'LoRA' if adapted else 'full'} | {found['phase']} | ")
        rows[-1] += f"{', '.join(found['checkpoints']) or 'none'} | {', '.join(found['unfinished']) or '-'} | "
        rows[-1] += f"{'DIFFERENT' if found['different'] else 'bit-identical'} |"
    with capsys.disabled():
        print("\n".join(["", *rows]))
    assert not [row for row in rows if "DIFFERENT" in row]
