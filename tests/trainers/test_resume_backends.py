"""Two processes write one checkpoint, together, and go on from it: DDP, ZeRO-2, ZeRO-3."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import biasunlearn_trainer
import sys
import torch
from pathlib import Path
from peft import LoraConfig
from biasunlearn_trainer import NPOConfig, NPOTrainer
from biasunlearn_trainer.checkpoints import CheckpointError, checkpoints_in, faults_of, read_seal
from biasunlearn_trainer.guards import TrainingFault
from biasunlearn_trainer.models import load_model

model, folder, backend = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
rows = [{"prompt": f"Who was {i}?", "completion": " The " + "tall " * (i % 3) + "one."} for i in range(8)]

weights = []  # digests of every run's last checkpoint

def run(output, adapted, resume=None, **more):
    settings = dict(
        max_steps=6, per_device_train_batch_size=2, save_strategy="steps", save_steps=2, save_total_limit=2,
        learning_rate=1e-3, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, bf16=False,
        reference_cache_dir=str(folder / "references"),
    )
    args = NPOConfig(str(folder / output), **{**settings, **more})
    assert args.world_size == 2
    torch.manual_seed(0)
    trainer = NPOTrainer(
        model=load_model(model), args=args, forget_dataset=rows, retain_dataset=rows,
        peft_config=LoraConfig(r=2, lora_dropout=0.1) if adapted else None,
    )
    trainer.train(resume_from_checkpoint=resume)
    last = folder / output / f"checkpoint-{args.max_steps}"
    if last.is_dir():
        weights.append({name: file for name, file in read_seal(last)["files"].items() if name.endswith(".safetensors")})
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]

for adapted in (False, True):
    name = f"{backend}-{adapted}"
    whole = run(name, adapted)
    folders = checkpoints_in(folder / name)
    assert [path.name for path in folders] == ["checkpoint-4", "checkpoint-6"], folders
    assert not (folder / name / "unfinished").exists()
    for path in folders:
        assert faults_of(path) == [], faults_of(path)
        assert read_seal(path)["run"]["backend"] == {"ddp": "whole", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}[backend]
    run(name, adapted, str(folders[0]))
    again = run(name, adapted, str(folder / name / "checkpoint-4"))
    assert again == whole, (again, whole)
    first, *others = weights[-3:]
    assert first and others == [first, first], weights
    try:
        run(name, adapted, True, per_device_train_batch_size=1)
        raise SystemExit("another global batch was accepted")
    except CheckpointError as err:
        assert "has to be 4" in str(err)
try:
    run("fault", False, learning_rate=1e30, save_steps=1)
    raise SystemExit("it went on with a gradient that is no number")
except TrainingFault as err:
    assert str(err).startswith("step 2: the gradient's norm is"), err
    assert str(folder / "fault" / "checkpoint-1") in str(err), err
assert [path.name for path in checkpoints_in(folder / "fault")] == ["checkpoint-1"]
print("as one run")
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["ddp", "zero2", "zero3"])
def test_two_processes_go_on_from_a_checkpoint_of_two(backend, tiny_llama, launch_environment, tmp_path):
    environment = {**os.environ, **launch_environment(backend)}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*launch, str(tiny_llama), str(tmp_path), backend], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-4000:]
    assert "as one run" in done.stdout
