"""What a launch may not be, said before a model is loaded; and the whole run on every backend."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from biasunlearn_trainer.eval.schema import load_results
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run
from biasunlearn_trainer.runner.launch import check_launch
from biasunlearn_trainer.sharding import is_fsdp

RUN = Path(__file__).resolve().parents[2] / "recipes" / "run.py"


@pytest.fixture
def recipe_of(tiny_llama, tmp_path):
    """`recipe_of(*words)`: a recipe on a tiny Llama, with further keys."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Who?", "completion": " One."}\n' * 4)
    (tmp_path / "recipe.yaml").write_text(
        f"method: ga\nmodel_name_or_path: {tiny_llama}\nforget_dataset: {tmp_path}/rows.jsonl\nuse_cpu: true\n"
        f"output_dir: {tmp_path}/out\nreport_to: none\n"
    )
    return lambda *words: parse_recipe([str(tmp_path / "recipe.yaml"), *words])


def test_processes_that_do_not_see_each_other_are_refused(recipe_of, monkeypatch):
    recipe = recipe_of()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="2 processes were launched, each sees 1"):
        run(recipe)


def test_fsdp_on_a_cpu_is_plain_ddp_and_is_said_to_be(recipe_of, monkeypatch, caplog):
    recipe = recipe_of()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with caplog.at_level(logging.WARNING):
        check_launch(recipe)
    assert "plain DDP" in caplog.text and not is_fsdp()


@pytest.fixture
def sharded(monkeypatch):
    """What a launch with FSDP on GPUs looks like from inside; there is none on a CPU."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")

    def as_seen(recipe):
        monkeypatch.setattr(recipe.training.distributed_state, "distributed_type", DistributedType.FSDP)
        return recipe

    return as_seen


def test_what_cannot_be_sharded_is_refused(recipe_of, sharded):
    with pytest.raises(RecipeError, match="A saliency mask needs whole weights"):
        run(sharded(recipe_of("--saliency_mask", "random")))
    with pytest.raises(RecipeError, match="`load_in_4bit`: quantised weights cannot be sharded"):
        run(sharded(recipe_of("--load_in_4bit", "true")))
    with pytest.raises(RecipeError, match="`probes`: what FSDP shards cannot be measured"):
        run(sharded(recipe_of("--tasks", "forget_set", "--probes", "forget_set")))


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        ("bf16", ["--fp16", "true"], "mixed_precision bf16, the recipe `fp16: true`"),
        ("fp16", ["--bf16", "true"], "mixed_precision fp16, the recipe `bf16: true`"),
        ("bf16", ["--bf16", "false"], "mixed_precision bf16, the recipe `bf16: false`"),
    ],
)
def test_a_config_that_contradicts_the_recipe_is_refused(recipe_of, monkeypatch, config, words, message):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", config)
    with pytest.raises(RecipeError, match=message):
        check_launch(recipe_of(*words))
    check_launch(recipe_of())


@pytest.fixture(scope="module")
def run_as(tmp_path_factory, launch_environment):
    """`run_as(launch)`: the planted world's recipe, eight steps, with probes, answers and oracle; its output folder."""
    folders = {}

    def whole_run(launch):
        if launch in folders:
            return folders[launch]
        processes, environment = (1, {}) if launch == "one" else (2, launch_environment(launch))
        folder = folders[launch] = tmp_path_factory.mktemp(launch)
        start = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        keys = {"max_steps": 8, "per_device_train_batch_size": 8 // processes, "probe_steps": 4, "retain_loss": "kl"}
        keys |= {"retain_dataset": "testbed:retain", "use_cpu": "true", "output_dir": folder}
        words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
        done = subprocess.run(
            [*(start if processes > 1 else start[:1]), RUN, RUN.with_name("planted_llava_npo.yaml"), *words],
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, "\n".join(line for line in done.stderr.splitlines() if "Error" in line)
        return folder

    return whole_run


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["ddp", "zero2", "zero3"])
def test_a_run_gives_the_same_numbers_on_every_backend(launch, run_as):
    """Full fine-tuning against a second model; both the figures and the weights that were saved."""
    one, many = run_as("one"), run_as(launch)
    for name in ("before", "after", "oracle"):
        alone, together = (load_results(folder / "results.json")[name].tasks["planted"] for folder in (one, many))
        for metric, value in alone.metrics.items():
            assert together.metrics[metric].value == pytest.approx(value.value, abs=0.01), (name, metric)
    probes = [
        [entry for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"] if "loss" in entry]
        for folder in (one, many)
    ]
    assert [e["loss"] for e in probes[0]] == pytest.approx([e["loss"] for e in probes[1]], abs=1e-3)
    weights = [load_file(folder / "model.safetensors") for folder in (one, many)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=2e-4)
