"""Where weights are, for every family, inside PEFT and not; and the statistics over places."""

import pytest
import torch
from accelerate import init_empty_weights
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GPT2Config, T5Config

from biasunlearn_trainer.models import load_config, load_model, lora_targets, model_class
from biasunlearn_trainer.saliency import SaliencyMask
from biasunlearn_trainer.saliency.distribution import (
    Distribution,
    Share,
    groups_table,
    in_mask,
    layers_table,
    single_table,
)
from biasunlearn_trainer.saliency.places import Place, Places

LM, CONNECTOR, VISION = "language_model", "connector", "vision_tower"


def places_of(folder) -> Places:
    with init_empty_weights():
        return Places(model_class(load_config(str(folder))).from_config(load_config(str(folder))))


@pytest.mark.parametrize(
    ("family", "name", "place"),
    [
        ("llama", "model.layers.1.self_attn.q_proj.weight", Place(LM, 1, "self_attn.q_proj")),
        ("llama", "model.layers.0.input_layernorm.weight", Place(LM, 0, "input_layernorm")),
        ("llama", "model.embed_tokens.weight", Place(LM, None, "embed_tokens")),
        ("llama", "lm_head.weight", Place(LM, None, "lm_head")),
        ("llava", "model.language_model.layers.1.mlp.up_proj.weight", Place(LM, 1, "mlp.up_proj")),
        ("llava", "model.multi_modal_projector.linear_2.bias", Place(CONNECTOR, None, "linear_2")),
        ("llava", "model.vision_tower.encoder.layers.0.mlp.fc1.bias", Place(VISION, 0, "mlp.fc1")),
        (
            "llava",
            "model.vision_tower.embeddings.class_embedding",
            Place(VISION, None, "embeddings.class_embedding"),
        ),
        ("qwen2vl", "model.visual.blocks.0.attn.qkv.weight", Place(VISION, 0, "attn.qkv")),
        # An nn.Sequential numbers things of different kinds, not layers.
        ("qwen2vl", "model.visual.merger.mlp.2.weight", Place(CONNECTOR, None, "mlp.2")),
        ("blip2", "query_tokens", Place(CONNECTOR, None, "query_tokens")),
        (
            "blip2",
            "qformer.encoder.layer.1.attention.attention.query.weight",
            Place(CONNECTOR, 1, "attention.attention.query"),
        ),
        ("blip2", "language_projection.weight", Place(CONNECTOR, None, "language_projection")),
        ("blip2", "language_model.model.decoder.layers.1.fc1.weight", Place(LM, 1, "fc1")),
        ("blip2", "language_model.lm_head.weight", Place(LM, None, "lm_head")),
    ],
)
def test_places_of_the_families(family, name, place, tiny_family):
    assert places_of(tiny_family(family)).of(name) == place


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2vl", "blip2", "minigpt4"])
def test_every_weight_has_one_place(family, tiny_family):
    model = load_model(str(tiny_family(family)))
    places = Places(model)
    assert sum(places.sizes.values()) == sum(value.numel() for value in model.parameters())
    assert next(iter(places.sizes)).group == LM


def test_gpt2_and_tied_heads():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11))
    places = Places(model)
    assert places.of("transformer.h.1.attn.c_attn.bias") == Place(LM, 1, "attn.c_attn")
    assert places.of("transformer.wte.weight") == Place(LM, None, "wte")
    assert Place(LM, None, "lm_head") not in places.sizes  # one weight with wte, counted once


def test_two_stacks_of_a_group_are_told_apart():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=2, num_heads=2, vocab_size=11)
    places = Places(AutoModelForSeq2SeqLM.from_config(config), {"all": [""]})
    encoder = places.of("encoder.block.1.layer.0.SelfAttention.q.weight")
    decoder = places.of("decoder.block.1.layer.0.SelfAttention.q.weight")
    assert encoder.layer == decoder.layer == 1
    assert (encoder.kind, decoder.kind) == ("encoder.layer.SelfAttention.q", "decoder.layer.SelfAttention.q")
    # The two last norms have one name below their stacks.
    assert places.of("encoder.final_layer_norm.weight") != places.of("decoder.final_layer_norm.weight")


def test_experts_of_a_layer_share_a_place(tiny_llama):
    model = load_model(str(tiny_llama))
    model.model.layers[1].mlp.experts = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
    places = Places(model)
    assert places.sizes[Place(LM, 1, "mlp.experts")] == 12
    assert places.of("model.layers.1.mlp.experts.2.weight") == Place(LM, 1, "mlp.experts")


@pytest.mark.parametrize("family", ["llava", "blip2"])
def test_names_of_an_adapter_are_those_of_its_modules(family, tiny_family):
    model = load_model(str(tiny_family(family)))
    plain = Places(model)
    names = {name for name, _ in model.named_parameters()}
    sizes = plain.sizes
    saved = ["lm_head"] if family == "llava" else None  # BLIP-2's OPT shares its head with the embeddings
    model = get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model), modules_to_save=saved))
    places = Places(model)
    for name, _ in model.named_parameters():
        assert plain.of(name) == places.of(name)
    assert any("lora_B" in name for name, _ in model.named_parameters())
    assert {places.of(name) for name in names} == {*sizes}
    # The adapter counts nowhere; a module trained whole is there twice, as it was and as it is.
    head = Place(LM, None, "lm_head")
    assert {p: n for p, n in places.sizes.items() if p != head} == {p: n for p, n in sizes.items() if p != head}


def test_an_unknown_weight_is_an_error(tiny_llama):
    with pytest.raises(KeyError, match=r"no weight visual\.blocks\.0\.weight"):
        places_of(tiny_llama).of("visual.blocks.0.weight")


@pytest.fixture
def counted(tiny_llava):
    """A mask by hand: of layer 0's q_proj (32 x 32) 256 weights, of layer 1's none, all 32 of a projector's bias."""
    mask = SaliencyMask.empty()
    first = torch.zeros(32, 32, dtype=torch.bool)
    first[:8] = True
    mask.put("model.language_model.layers.0.self_attn.q_proj.weight", first)
    mask.put("model.language_model.layers.1.self_attn.q_proj.weight", torch.zeros(32, 32, dtype=torch.bool))
    mask.put("model.multi_modal_projector.linear_1.bias", torch.ones(32, dtype=torch.bool))
    return in_mask(mask, places_of(tiny_llava))


def test_shares_by_place_group_and_union(counted):
    assert counted.shares[Place(LM, 0, "self_attn.q_proj")] == Share(1024, 256)
    assert counted.shares[Place(LM, 1, "self_attn.q_proj")] == Share(1024, 0)
    assert counted.groups == [LM, CONNECTOR]
    assert counted.of_groups([LM]) == Share(2048, 256)
    # 256 + 32 of 2048 + 32.
    assert counted.unions()[LM, CONNECTOR] == counted.total == Share(2080, 288)
    assert counted.total.share == pytest.approx(288 / 2080)
    assert Share().share == 0


def test_tables(counted):
    assert "| language_model + connector | 2,080 | 288 | 13.8 % |" in groups_table([counted])
    lines = layers_table(counted, LM).splitlines()
    assert lines[0] == "| layer | self_attn.q_proj |"
    assert lines[2:] == ["| 0 | 25.0 % |", "| 1 | 0.0 % |", "| all | 12.5 % |"]
    assert layers_table(counted, CONNECTOR) == "" == single_table(counted, LM)
    assert "| linear_1 | 32 | 32 | 100.0 % |" in single_table(counted, CONNECTOR)


def test_json(counted):
    data = counted.to_dict()
    assert data["groups"][0] == {"groups": [LM], "covered": 2048, "chosen": 256, "share": 0.125}
    assert data["places"][-1] == {
        "group": CONNECTOR,
        "layer": None,
        "kind": "linear_1",
        "covered": 32,
        "chosen": 32,
    } | {"share": 1.0}


def test_an_adapter_mask_counts_at_its_module(tiny_llava):
    mask = SaliencyMask.empty()
    name = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_B.default.weight"
    mask.put(name, torch.tensor([[True, False]] * 48))
    assert in_mask(mask, places_of(tiny_llava)).shares == {Place(LM, 1, "mlp.up_proj"): Share(96, 48)}


def test_a_table_of_two_distributions_leaves_out_what_one_lacks():
    one = Distribution("A", {Place("x", None, "a"): Share(10, 5)})
    other = Distribution("B", {Place("x", None, "a"): Share(10, 1), Place("y", None, "b"): Share(10, 2.5)})
    assert groups_table([one, other]).splitlines()[2:] == [
        "| x | 10 | 5 | 50.0 % | 10.0 % |",
        "| y |  |  |  | 25.0 % |",
        "| x + y |  |  |  | 17.5 % |",
    ]
