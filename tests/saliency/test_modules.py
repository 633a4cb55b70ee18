"""Ranking modules by their share of salient weights, and the recipe's line that peft takes."""

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM, GPT2Config

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.recipe import parse_recipe
from biasunlearn_trainer.saliency import SaliencyMask
from biasunlearn_trainer.saliency.distribution import Share
from biasunlearn_trainer.saliency.modules import modules_table, rank_modules, target_modules_line

# The vision tower has modules of the same last names and layer numbers.
NAMES = [
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.layers.0.mlp.up_proj",
    "model.vision_tower.encoder.layers.0.self_attn.q_proj",
]


def mask_of(model, shares):
    """A mask that covers every weight, with the first rows of some salient."""
    mask = SaliencyMask.empty()
    for name, value in model.named_parameters():
        flags = torch.zeros(value.shape, dtype=torch.bool)
        flags[: shares.get(name, 0)] = True
        mask.put(name, flags)
    return mask


def test_the_largest_share_comes_first_whatever_the_size(tiny_llava):
    """8 of 32 rows, 9 of 48, 7 of 32: 25, 18.75 and 21.9 %. A bias and the head do not count."""
    model = load_model(str(tiny_llava))
    rows = dict(zip((f"{name}.weight" for name in NAMES), (8, 9, 7), strict=True))
    ranked = rank_modules(mask_of(model, {**rows, f"{NAMES[2]}.bias": 32, "lm_head.weight": 200}), model)
    assert [name for name, _ in ranked[:3]] == [NAMES[0], NAMES[2], NAMES[1]]
    assert ranked[0][1] == Share(1024, 256) and ranked[3][1].chosen == 0
    assert "lm_head" not in dict(ranked)
    assert f"| {NAMES[0]} | 1,024 | 256 | 25.0 % |" in modules_table(ranked)


@pytest.mark.parametrize("num", [1, 2, 3])
def test_peft_puts_adapters_on_these_and_no_others(num, tiny_llava, tmp_path):
    """The printed line goes through a recipe, as a user would paste it."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"method: ga\nmodel_name_or_path: {tiny_llava}\nforget_dataset: x.jsonl\nuse_cpu: true\nuse_peft: true\n"
        f"{target_modules_line(NAMES[:num])}\n"
    )
    parsed = parse_recipe([str(recipe)])
    model = load_model(str(tiny_llava))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=parsed.model.lora_target_modules))
    found = [name for name, module in adapted.get_base_model().named_modules() if isinstance(module, LoraLayer)]
    assert sorted(found) == sorted(NAMES[:num])


def test_the_line_is_yaml():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(60)]
    line = target_modules_line(names)
    assert "\n" not in line and yaml.safe_load(line) == {"lora_target_modules": names}


def test_gpt2_keeps_its_matrices_in_another_class():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11))
    ranked = rank_modules(mask_of(model, {"transformer.h.0.mlp.c_fc.weight": 4}), model)
    assert ranked[0][0] == "transformer.h.0.mlp.c_fc" and len(ranked) == 4


def test_masks_that_rank_nothing_are_refused(tiny_llama):
    model = load_model(str(tiny_llama))
    mask = SaliencyMask.empty()
    with pytest.raises(ValueError, match="covers no linear layer"):
        rank_modules(mask, model)
    mask.put("base_model.model.lm_head.lora_B.default.weight", torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="covers the weights of an adapter"):
        rank_modules(mask, model)
