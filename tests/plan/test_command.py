"""`--plan` on the command line: published shapes without weights, real lengths, faults."""

import json

import pytest
import torch

from biasunlearn_trainer.plan import describe, plan
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import main

# The published config.json of llava-hf/llava-1.5-7b-hf, where it differs from the defaults of its classes.
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "tie_word_embeddings": False,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "text_config": {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064},
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "image_size": 336,
        "patch_size": 14,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 768,
    },
}
SMALL_TEXT = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = {
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
    "mistral": {**SMALL_TEXT, "num_key_value_heads": 2},
    "qwen2": {**SMALL_TEXT, "num_key_value_heads": 2},
    "qwen2_vl": {
        "text_config": {
            **SMALL_TEXT,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
    },
    "blip-2": {
        "num_query_tokens": 8,
        "image_token_index": 50265,
        "text_config": {"model_type": "llama", "vocab_size": 50300, **SMALL_TEXT},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
        },
        "qformer_config": {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "encoder_hidden_size": 32,
        },
    },
}


def folder_of(config, path):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def words(model, *more, method="npo"):
    """A recipe whose data nobody has."""
    given = ["--method", method, "--model_name_or_path", model, "--forget_dataset", "/nowhere/forget.jsonl"]
    given += ["--retain_dataset", "/nowhere/retain.jsonl", "--use_cpu", "--per_device_train_batch_size", "2"]
    return [*given, "--plan", *more]


def faults(arguments):
    with pytest.raises(RecipeError) as caught:
        plan(parse_recipe(arguments))
    return str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_family_without_weights_data_or_processor(family, tmp_path):
    model = folder_of({"model_type": family, **FAMILIES[family]}, tmp_path / "model")
    made = plan(parse_recipe(words(model, "--use_peft", "--plan_completion_tokens", "5", "--plan_row_tokens", "300")))
    # LoRA of rank 16 on linear layers: A and B in float32 with AdamW's two states.
    assert made.memory.optimizer == 8 * made.trainable > 0
    assert made.tokens == 2 * 2 * 300 and made.steps is None and made.reference == "forget: adapter switched off"
    assert made.memory.activations > 0 and made.memory.reference == 0


def test_the_command_prints_and_loads_nothing(tmp_path, capsys):
    model = folder_of({"model_type": "gpt2", **FAMILIES["gpt2"]}, tmp_path / "model")
    arguments = words(model, "--max_steps", "10", "--plan_throughput", "1000", "--plan_gpu_memory", "0.01")
    assert main([*arguments, "--output_dir", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "WARNING: it will not fit" in said and "0.0100 GiB of the GPU given" in said
    # 2 streams of 2 rows of 512 tokens, 10 steps.
    assert "10 of 2,048 tokens each" in said and "0.3 min of training" in said
    assert "no data: forget_dataset: No file" in said and not (tmp_path / "out").exists()


def test_lengths_and_steps_of_the_data(write_recipe):
    made = plan(parse_recipe([write_recipe("npo", max_steps=-1, num_train_epochs=3)]))
    assert (
        made.steps == 6 and "the longest rows of the data" in made.rows and made.reference == "forget: a number a row"
    )
    assert made.memory.reference == 4 * 8


@pytest.mark.parametrize("settings", [{"bf16": True}, {"dtype": "bfloat16"}, {"load_in_4bit": True, "use_peft": True}])
def test_less_precision_needs_less(settings, write_recipe):
    whole = plan(parse_recipe([write_recipe("ga", use_peft="use_peft" in settings, retain_dataset=None)]))
    less = plan(parse_recipe([write_recipe("ga", retain_dataset=None, **settings)]))
    assert less.memory.total < whole.memory.total and less.parameters == whole.parameters


def test_a_mask_is_planned_with_its_making(write_recipe):
    made = plan(parse_recipe([write_recipe("mmunlearner")]))
    assert made.memory.mask == made.trainable and made.building > 2 * 4 * made.trainable
    assert made.needed == max(made.memory.total, made.building)


def test_faults_are_those_of_training(tmp_path, write_recipe):
    assert "zero4" in faults([write_recipe("npo"), "--plan_backend", "zero4"])
    assert "whole weights" in faults([write_recipe("mmunlearner"), "--plan_backend", "zero3", "--plan_processes", "2"])
    assert "whole weights" in faults([write_recipe("mmunlearner"), "--plan_backend", "fsdp2", "--plan_processes", "2"])
    assert "one process" in faults([write_recipe("npo"), "--plan_backend", "none", "--plan_processes", "2"])
    assert "model_name_or_path" in faults(words(str(tmp_path / "nothing")))
    (tmp_path / "odd").mkdir()
    assert "nonesuch" in faults(words(folder_of({"model_type": "nonesuch"}, tmp_path / "odd")))
    model = folder_of({"model_type": "gpt2", **FAMILIES["gpt2"]}, tmp_path / "model")
    assert "no room" in faults(words(model, "--plan_row_tokens", "40"))
    assert "plan_processes" in faults(words(model, "--plan_processes", "0"))


@pytest.mark.slow
def test_llava_7b_as_its_recipe_has_it(tmp_path):
    model = folder_of(LLAVA_7B, tmp_path / "llava")
    made = plan(parse_recipe(["recipes/llava_npo.yaml", "--model_name_or_path", model, "--use_cpu"]))
    # Seven LoRA pairs of rank 8 in 32 layers: 4 x (4096 + 4096) and 3 x (4096 + 11008).
    assert made.trainable == 32 * 8 * (4 * 8192 + 3 * 15104)
    assert made.parameters == 7_063_427_072 + made.trainable
    assert made.memory.weights >= 2 * 7_063_427_072 and made.memory.optimizer == 8 * made.trainable
    assert "It fits" not in describe(made) and torch.get_default_dtype() == torch.float32
