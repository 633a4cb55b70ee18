"""What a launch may not be, said before a model is loaded; and the whole run on every backend."""

import logging

import pytest
from accelerate.utils import DistributedType

from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run
from biasunlearn_trainer.runner.launch import check_launch
from biasunlearn_trainer.sharding import is_fsdp


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
