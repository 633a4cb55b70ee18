"""MiniGPT-4's published layer and its two frozen halves become one folder, equal to the three wired by hand."""

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import Blip2ForConditionalGeneration, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.converters.minigpt4 import ConversionError, convert, main, read_projection
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.testbed.architectures.tokenizer import train_bpe

QUERIES, WIDTH, LLAMA_WIDTH = 4, 32, 40


@pytest.fixture(scope="module")
def blip2(tiny_family):
    return str(tiny_family("blip2"))


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """A Llama whose tokenizer, as Vicuna's, knows no image token and has no pad."""
    folder = tmp_path_factory.mktemp("vicuna")
    backend = train_bpe(["Who was the tall one?"], 4000, ["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )  # fmt: skip
    shape = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), hidden_size=LLAMA_WIDTH, **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def published(path, width=LLAMA_WIDTH, **more):
    """A checkpoint as the training code saves it: what was trained, buffers, and all that it needs to go on."""
    generator = torch.Generator().manual_seed(1)
    model = {
        "llama_proj.weight": torch.randn(width, WIDTH, generator=generator) / 5,
        "llama_proj.bias": torch.randn(width, generator=generator),
        "llama_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "Qformer.bert.embeddings.position_ids": torch.arange(9)[None],
        **more,
    }
    config = {"run": {"task": "image_text_pretrain", "max_epoch": 5}, "model": {"arch": "mini_gpt4"}}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 3e-5, "params": [0]}]}
    torch.save(
        {"model": model, "optimizer": optimizer, "config": config, "scaler": {"scale": 65536.0}, "epoch": 4}, path
    )
    return str(path)


@pytest.fixture(scope="module")
def converted(blip2, vicuna, tmp_path_factory):
    folder = tmp_path_factory.mktemp("minigpt4")
    projection = published(folder / "pretrained_minigpt4_7b.pth")
    words = {"projection": projection, "llama": vicuna, "blip2": blip2, "output": folder / "out", "dtype": "float32"}
    main([str(word) for name, value in words.items() for word in (f"--{name}", value)])
    return folder / "out", projection


def test_logits_are_those_of_the_parts_wired_by_hand(converted, blip2, vicuna):
    folder, projection = converted
    model, processor = load_model(str(folder)).eval(), load_processor(str(folder))
    assert type(model) is Blip2ForConditionalGeneration and (folder / "model.safetensors").is_file()
    rows = [
        {"prompt": "Who was the one?", "completion": " The tall one.", "images": [Image.new("RGB", (32, 32), "red")]}
    ]
    batch = CompletionCollator(processor)(rows)
    inputs = {name: value for name, value in batch.items() if name != "completion_mask"}
    ids = batch["input_ids"]

    image_half, llama = load_model(blip2).eval(), load_model(vicuna).eval()
    layer = torch.load(projection, weights_only=True)["model"]
    with torch.no_grad():
        seen = image_half.vision_model(batch["pixel_values"]).last_hidden_state
        asked = image_half.qformer(query_embeds=image_half.query_tokens, encoder_hidden_states=seen).last_hidden_state
        tokens = asked @ layer["llama_proj.weight"].T + layer["llama_proj.bias"]
        start = int((ids[0] == model.config.image_token_id).int().argmax())
        parts = (ids[:, :start], ids[:, start + QUERIES :])
        before, after = (llama.get_input_embeddings()(part) for part in parts)
        expected = llama(inputs_embeds=torch.cat([before, tokens, after], 1)).logits
        got = model(**inputs).logits
    torch.testing.assert_close(got[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)
    assert not got[..., expected.shape[-1] :].any(), "the image token's own row of the head is zero"


def test_the_prompt_is_minigpt4s(converted, blip2, vicuna, tmp_path):
    processor = load_processor(str(converted[0]))
    chat = {
        "prompt": [{"role": "user", "content": "Who was?"}],
        "completion": [{"role": "assistant", "content": "The one."}],
        "images": [Image.new("RGB", (32, 32))],
    }
    batch = CompletionCollator(processor)([chat])
    image = "<image>" * QUERIES
    assert processor.tokenizer.decode(batch["input_ids"][0]) == (
        f"<s>###Human: <Img>{image}</Img> Who was? ###Assistant: The one.###"
    )
    assert processor.tokenizer.decode(batch["input_ids"][0][batch["completion_mask"][0]]) == " The one.###"
    convert(converted[1], vicuna, str(tmp_path / "out"), blip2, torch.float16, prompt="llama2")
    batch = CompletionCollator(load_processor(str(tmp_path / "out")))([chat])
    assert processor.tokenizer.decode(batch["input_ids"][0]) == (
        f"<s>[INST] <Img>{image}</Img> Who was? [/INST] The one.</s>"
    )
    model = load_model(str(tmp_path / "out"))
    assert model.language_projection.weight.dtype == torch.float16
    assert model.query_tokens.dtype == model.qformer.layernorm.weight.dtype == torch.float32


def test_a_projection_of_another_width_lists_both_shapes(blip2, vicuna, tmp_path):
    projection = published(tmp_path / "13b.pth", width=48)
    with pytest.raises(ConversionError) as raised:
        convert(projection, vicuna, str(tmp_path / "out"), blip2)
    assert raised.value.faults[:2] == [
        "shape of language_projection.weight: got (48, 32), expected (40, 32)",
        "shape of language_projection.bias: got (48,), expected (40,)",
    ]
    assert "another width" in raised.value.faults[2] and not (tmp_path / "out").exists()


def test_a_blip2_without_an_image_half_lists_what_is_missing(blip2, vicuna, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "blip2"
    load_model(blip2).save_pretrained(broken)
    load_processor(blip2).save_pretrained(broken)
    weights = load_file(broken / "model.safetensors")
    del weights["query_tokens"], weights["vision_model.post_layernorm.bias"]
    weights["qformer.layernorm.more"] = torch.zeros(3)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConversionError) as raised:
        convert(published(tmp_path / "p.pth"), vicuna, str(tmp_path / "out"), str(broken))
    assert sorted(raised.value.faults) == [
        "missing: query_tokens (1, 4, 32)",
        "missing: vision_model.post_layernorm.bias (32,)",
        "no place for: qformer.layernorm.more (3,)",
    ]


class Code:
    def __reduce__(self):
        return (print, ("run",))


def test_what_is_no_projection_is_refused(blip2, vicuna, tmp_path, capsys):
    path = tmp_path / "p.pth"
    torch.save({"weights": {}}, path)
    with pytest.raises(ConversionError, match=r"has no `model` with weights in it; found: \['weights'\]"):
        read_projection(str(path))
    published(path, **{"visual_encoder.cls_token": torch.zeros(1)})
    with pytest.raises(ConversionError, match=r"has 'visual_encoder.cls_token', for which MiniGPT-4 has no place"):
        read_projection(str(path))
    torch.save({"model": {"llama_proj.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(ConversionError, match=r"lacks 'llama_proj.bias'"):
        read_projection(str(path))
    torch.save({"model": Code()}, path)
    with pytest.raises(ConversionError, match="holds more than tensors"):
        read_projection(str(path))
    assert "run" not in capsys.readouterr().out
    with pytest.raises(ConversionError, match="is a 'llama' model, expected 'blip-2'"):
        convert(published(path), vicuna, str(tmp_path / "out"), vicuna)


def test_the_command_writes_over_nothing_and_says_what_is_wrong(blip2, vicuna, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    words = ["--llama", vicuna, "--blip2", blip2, "--output", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["--projection", published(tmp_path / "p.pth"), *words])
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--projection", str(tmp_path / "absent.pth"), *words[:-1], str(tmp_path / "new")])
    assert "absent.pth" in capsys.readouterr().err
