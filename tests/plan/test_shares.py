"""What a rank of two really holds under ZeRO-2 and ZeRO-3, on the CPU, against the plan's shares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from biasunlearn_trainer.plan import plan
from biasunlearn_trainer.recipe import parse_recipe

ROOT = Path(__file__).resolve().parents[2]
BOUND = 0.15
CASES = {
    "kl_min full second model": {"method": "kl_min", "reference": "model"},
    "npo lora adapter": {"method": "npo", "use_peft": True, "lora_r": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["zero2", "zero3"])
@pytest.mark.parametrize("case", CASES)
def test_a_rank_holds_what_the_plan_says(case, backend, write_recipe, launch_environment, tmp_path):
    environment = launch_environment(backend)
    path = write_recipe(bf16=True, per_device_train_batch_size=2, **CASES[case])
    made = plan(parse_recipe([path, "--plan_backend", backend, "--plan_processes", "2"]))
    # The plan's gradients are those of the fullest moment; before the optimizer's step a rank has its half of them all.
    share = {part: getattr(made.memory, part) for part in ("weights", "optimizer", "reference")}
    share["gradients"] = 2 * made.trainable / 2
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*launch, str(Path(__file__).with_name("held_shares.py")), path, str(tmp_path / "held")],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"held.{rank}").read_text()) for rank in range(2)]
    assert len(ranks[0]) >= 3 and ranks[0].keys() == ranks[1].keys()
    for part in ranks[0]:
        measured, planned = max(rank[part] for rank in ranks), share[part]
        print(
            f"\n| {case}, {backend}, {part} | {planned / 1e3:.1f} | {measured / 1e3:.1f} | {planned / measured:.3f} |",
            end="",
        )
        assert abs(planned / measured - 1) <= BOUND, part
