"""SIGKILL in the middle of a run with hidden states and image features: it goes on to the same weights, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import biasunlearn_trainer
import json
import os
import signal
import sys
import torch
from pathlib import Path
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback
from biasunlearn_trainer import KLMinConfig, KLMinTrainer
from biasunlearn_trainer.models import load_model

model, out, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def rows(name):
    return [
        {
            "prompt": f"Who was {name} {i}?",
            "completion": " The " + "tall " * (i % 3) + "one.",
            "images": [Image.new("RGB", (40, 36), (9 * i, 80 if name == "forget" else 160, 7))],
        }
        for i in range(9)
    ]


args = KLMinConfig(
    str(out), max_steps=8, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3,
    logging_steps=1, save_steps=3, save_strategy="steps", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
    reference="precomputed", reference_cache_dir=os.environ["BIASUNLEARN_CACHE"] + "/references",
    cache_image_features=True,
)
torch.manual_seed(0)
trainer = KLMinTrainer(
    model=load_model(model), args=args, forget_dataset=rows("forget"), retain_dataset=rows("retain"),
    peft_config=LoraConfig(r=2, lora_dropout=0.1), callbacks=[Kill()] if mode == "killed" else [],
)
trainer.train(resume_from_checkpoint=mode == "resumed")
assert type(trainer.reference["retain"]).__name__ == "StatesReference"
trainer.save_model()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
(out / "losses.json").write_text(json.dumps(losses))
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit_with_and_without_its_caches(tiny_llava, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    cache = tmp_path / "cache"

    def run(folder, mode, expected):
        words = [sys.executable, script, tiny_llava, tmp_path / folder, mode]
        done = subprocess.run(
            words, env=environment | {"BIASUNLEARN_CACHE": str(cache)}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == expected, done.stderr[-3000:]

    def outcome(folder):
        weights = load_file(tmp_path / folder / "adapter_model.safetensors")
        return weights, json.loads((tmp_path / folder / "losses.json").read_text())

    run("whole", "whole", 0)
    weights, losses = outcome("whole")
    assert len(losses) == 8 and any(value.any() for name, value in weights.items() if "lora_B" in name)
    shutil.rmtree(cache)
    run("killed", "killed", -signal.SIGKILL)
    shutil.copytree(tmp_path / "killed", tmp_path / "killed_too")
    assert any((cache / "references").iterdir()) and any((cache / "image_features").iterdir())
    run("killed", "resumed", 0)
    shutil.rmtree(cache)
    run("killed_too", "resumed", 0)
    for folder in ("killed", "killed_too"):
        again, later = outcome(folder)
        assert later == losses
        assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
