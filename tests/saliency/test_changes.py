"""What a run changed, read from whole models in one file or several and from LoRA adapters."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from biasunlearn_trainer.models import load_model, lora_targets
from biasunlearn_trainer.saliency import changes as module
from biasunlearn_trainer.saliency.changes import changes_of


def gathered(changes):
    """Changes by name, pieces put together again."""
    found = {}
    for name, change in changes():
        found.setdefault(name, []).append(change)
    return {name: torch.cat(pieces) if len(pieces) > 1 else pieces[0] for name, pieces in found.items()}


def nudged(folder, seed=0):
    """The model with every weight changed a little, and the changes."""
    torch.manual_seed(seed)
    model = load_model(str(folder))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value += 0.01 * torch.randn_like(value)
    return model, {name: value.detach() - before[name] for name, value in model.named_parameters()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, change in expected.items():
        assert torch.equal(found[name], change), name


@pytest.mark.parametrize(
    ("family", "shards"), [("llama", False), ("llava", True), ("qwen2vl", False), ("blip2", False)]
)
def test_whole_models_weight_by_weight(family, shards, tiny_family, tmp_path, monkeypatch):
    """Also where tensors lie in several files and are read in pieces, under the families' published names."""
    monkeypatch.setattr(module, "AT_ONCE", 500)
    model, expected = nudged(tiny_family(family))
    model.save_pretrained(tmp_path, max_shard_size="40KB" if shards else "1GB")
    assert (tmp_path / "model.safetensors.index.json").is_file() == shards
    changes = changes_of(str(tmp_path), str(tiny_family(family)))
    assert_same(gathered(changes), expected)
    assert_same(gathered(changes), expected)  # a second pass sees the same
    assert all(change.numel() <= 3072 for _, change in changes())
    assert sum(changes.places.sizes.values()) == sum(value.numel() for value in expected.values())


def test_the_same_model_under_two_layouts_of_names(tiny_llava, tmp_path):
    """One side as `save_pretrained` publishes it, the other under the model's own names."""
    model, expected = nudged(tiny_llava)
    model.save_pretrained(tmp_path)
    save_file({name: value.detach() for name, value in model.named_parameters()}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors").keys() != load_file(tiny_llava / "model.safetensors").keys()
    assert_same(gathered(changes_of(str(tmp_path), str(tiny_llava))), expected)


def test_a_bfloat16_run_is_compared_in_float32(tiny_llama, tmp_path):
    model, _ = nudged(tiny_llama)
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    found = gathered(changes_of(str(tmp_path), str(tiny_llama)))
    before = dict(load_model(str(tiny_llama), dtype=torch.float32).named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(found[name], value.detach().float() - before[name].detach())


def with_adapter(folder, output, **options):
    """A model with a LoRA adapter that does something, saved."""
    torch.manual_seed(0)
    model = load_model(str(folder))
    options = {"r": 2, "lora_alpha": 6, "target_modules": lora_targets(model), **options}
    model = get_peft_model(model, LoraConfig(**options))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name or "lora_embedding_B" in name or "modules_to_save" in name:
                value += 0.1 * torch.randn_like(value)
    model.save_pretrained(output)
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 1}, "rank_pattern": {"up_proj": 4}},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
    ],
    ids=["plain", "rslora", "patterns", "saved", "embedding"],
)
def test_an_adapter_changes_what_merging_it_changes(options, tiny_llava, tmp_path):
    with_adapter(tiny_llava, tmp_path, **options)
    found = gathered(changes_of(str(tmp_path), str(tiny_llava)))
    base = load_model(str(tiny_llava), dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in base.named_parameters()}
    merged = PeftModel.from_pretrained(base, str(tmp_path)).merge_and_unload()
    for name, after in merged.named_parameters():
        change = found.pop(name, torch.zeros(()))
        assert torch.allclose(after.detach() - before[name], change.expand_as(after), atol=1e-6), name
    assert not found


def test_one_adapted_matrix_by_hand(tiny_llama, tmp_path):
    """B A has rank 1 here, alpha / r = 3: with B = e_0 and A = (1, 2, ...) row 0 changes by 3, 6, ..."""
    name = "model.layers.1.self_attn.q_proj"
    model = load_model(str(tiny_llama))
    model = get_peft_model(model, LoraConfig(r=1, lora_alpha=3, target_modules=[name]))
    layer = model.get_base_model().get_submodule(name)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.arange(1.0, 33.0)[None])
        layer.lora_B["default"].weight[0] = 1.0
    model.save_pretrained(tmp_path)
    (change,) = gathered(changes_of(str(tmp_path), str(tiny_llama))).values()
    assert change[0].tolist() == [3.0 * i for i in range(1, 33)] and not change[1:].any()


@pytest.mark.parametrize(
    ("options", "said"),
    [({"use_dora": True}, "DoRA"), ({"bias": "lora_only"}, "biases"), ({"init_lora_weights": "olora"}, "olora")],
)
def test_an_adapter_that_is_no_such_sum_is_refused(options, said, tiny_llama, tmp_path):
    with_adapter(tiny_llama, tmp_path, **options)
    with pytest.raises(ValueError, match=f"cannot be told.*{said}"):
        changes_of(str(tmp_path), str(tiny_llama))


def test_runs_of_other_models_are_refused(tiny_llama, tiny_llava, tmp_path):
    with pytest.raises(ValueError, match=r"lacks weights of the model.*and .* more"):
        changes_of(str(tiny_llava), str(tiny_llama))
    with_adapter(tiny_llava, tmp_path)
    with pytest.raises(ValueError):
        changes_of(str(tmp_path), str(tiny_llama))
    with pytest.raises(ValueError, match="is an adapter itself"):
        changes_of(str(tiny_llava), str(tmp_path))


def test_other_shapes_are_named(tiny_llama, tmp_path):
    weights = load_file(tiny_llama / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"][:10].clone()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"was not trained from .*lm_head.weight is \(10, 32\)"):
        changes_of(str(tmp_path), str(tiny_llama))


def test_a_folder_without_a_run(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(OSError, match=r"neither model\.safetensors nor adapter_config\.json"):
        changes_of(str(tmp_path), str(tiny_llama))
