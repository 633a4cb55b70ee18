"""Groups, LoRA targets and freezing come from a model's structure."""

import re

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from PIL import Image as PILImage
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from biasunlearn_trainer.fingerprints import model_hash, processor_fingerprint, rows_fingerprint
from biasunlearn_trainer.models import (
    freeze_groups,
    group_of,
    load_config,
    load_model,
    load_processor,
    lora_targets,
    module_groups,
)


@pytest.fixture(scope="module")
def llava(tiny_llava):
    return load_model(str(tiny_llava))


def qwen2_vl():
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 99,
    }
    text |= {"num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


def blip2():
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = shape | {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    qformer = shape | {"intermediate_size": 64, "encoder_hidden_size": 32}
    text = OPTConfig(**shape, ffn_dim=64, vocab_size=99, word_embed_proj_dim=32).to_dict()
    config = Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4)
    return Blip2ForConditionalGeneration(config)


def test_groups_of_llava(llava):
    assert module_groups(llava) == {
        "language_model": ["model.language_model", "lm_head"],
        "connector": ["model.multi_modal_projector"],
        "vision_tower": ["model.vision_tower"],
    }


def test_qwen2_vl_keeps_its_merger_in_the_connector():
    groups = module_groups(qwen2_vl())
    assert groups["connector"] == ["model.visual.merger"]
    assert group_of("model.visual.merger.mlp.0.weight", groups) == "connector"
    assert group_of("model.visual.blocks.0.attn.qkv.weight", groups) == "vision_tower"


def test_blip2_connector_is_all_that_lies_between():
    groups = module_groups(blip2())
    assert groups["connector"] == ["query_tokens", "qformer", "language_projection"]


@pytest.mark.parametrize("build", [qwen2_vl, blip2])
def test_groups_cover_every_parameter(build):
    model = build()
    groups = module_groups(model)
    found = {group_of(name, groups) for name, _ in model.named_parameters()}
    assert found == {"language_model", "connector", "vision_tower"}


def test_lora_targets_stay_in_their_group(llava):
    targeted = {name for name, _ in llava.named_modules() if re.fullmatch(lora_targets(llava), name)}
    assert len(targeted) == 2 * 7 and all(name.startswith("model.language_model.layers.") for name in targeted)
    both = lora_targets(llava, ["vision_tower", "connector"])
    targeted = {name for name, _ in llava.named_modules() if re.fullmatch(both, name)}
    assert len(targeted) == 2 * 6 + 2 and not any("language_model" in name for name in targeted)


def test_lora_targets_of_gpt2_fit_peft():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=99, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    adapted = get_peft_model(model, LoraConfig(target_modules=lora_targets(model), fan_in_fan_out=True))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == 2 * 4


def test_an_unknown_group_names_those_there_are(llava, tiny_llama):
    with pytest.raises(ValueError, match=r"no module group 'vision'; it has: .*Did you mean 'vision_tower'"):
        lora_targets(llava, ["vision"])
    with pytest.raises(ValueError, match="it has: language_model"):
        freeze_groups(load_model(str(tiny_llama)), ["connector"])


def test_freezing_keeps_to_the_groups_and_to_what_gets_a_gradient(tiny_llava):
    model = load_model(str(tiny_llava))
    freeze_groups(model, None)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    # vision_feature_layer -2 of two layers: the second layer and the norm behind it are never read.
    assert frozen and all("encoder.layers.1." in name or "post_layernorm" in name for name in frozen)
    model = load_model(str(tiny_llava))
    freeze_groups(model, ["connector"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("model.multi_modal_projector.") for name in trained)


def test_a_missing_model_says_what_was_tried():
    with pytest.raises(OSError, match=r"'no/such-model' was not found: it is no folder with a config.json"):
        load_config("no/such-model")


def test_an_adapter_folder_loads_its_base(tiny_llama, tmp_path):
    model = load_model(str(tiny_llama))
    adapted = get_peft_model(model, LoraConfig(target_modules=lora_targets(model), init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    ids = torch.tensor([[1, 5, 6]])
    torch.testing.assert_close(loaded.eval()(ids).logits, adapted.eval()(ids).logits)


def test_model_hash_sees_weights_and_not_adapters(tiny_llama):
    model = load_model(str(tiny_llama))
    before = model_hash(model)
    assert model_hash(get_peft_model(model, LoraConfig(target_modules=lora_targets(model)))) == before
    other = load_model(str(tiny_llama))
    assert model_hash(other) == before
    other.lm_head.weight.data[0, 0] += 1e-3
    assert model_hash(other) != before


def test_rows_fingerprint_sees_what_the_model_sees(tmp_path):
    rows = [{"prompt": "a", "completion": "b", "source": "x"}, {"prompt": "c", "completion": "d", "source": "x"}]
    same = rows_fingerprint([{**row, "source": "y"} for row in rows])
    assert rows_fingerprint(rows) == same == rows_fingerprint(Dataset.from_list(rows))
    assert rows_fingerprint(rows[::-1]) != same
    assert rows_fingerprint([{"prompt": "ab", "completion": ""}]) != rows_fingerprint(
        [{"prompt": "a", "completion": "b"}]
    )
    path = tmp_path / "a.png"
    PILImage.new("RGB", (4, 4)).save(path)
    features = Features(prompt=Value("string"), completion=Value("string"), images=List(Image()))
    data = Dataset.from_dict({"prompt": ["a"], "completion": ["b"], "images": [[str(path)]]}, features=features)
    before = rows_fingerprint(data)
    PILImage.new("RGB", (9, 9), "red").save(path)
    assert rows_fingerprint(data) != before


def test_processor_fingerprint_sees_template_and_image_size(tiny_llava):
    processor = load_processor(str(tiny_llava))
    before = processor_fingerprint(processor)
    assert processor_fingerprint(load_processor(str(tiny_llava))) == before
    processor.chat_template += " "
    assert processor_fingerprint(processor) != before
