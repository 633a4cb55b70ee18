"""A KL's reference as hidden states on disk and the frozen head."""

import json
import logging
import resource
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.kept_files import checksum
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.reference import AdapterReference, ModelReference, PrecomputedReference
from biasunlearn_trainer.reference_states import (
    StatesReference,
    StatesUnavailable,
    StatesWriter,
    forward_states,
    frozen_head,
)

KL = {"npo": {"retain_loss": "kl"}, "simnpo": {"retain_loss": "kl"}, "dpo": {"retain_loss": "kl"}}
OFF = {"dynamic_swapping": False, "early_stop": False, "keep_best": False}


def gradients(trainer):
    """The loss's terms and gradients, after every trained weight moved away from where it began."""
    trainer.prepare_reference()
    trainer.model.eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in trainer.model.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn_like(value))
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in range(2)])
    loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    return terms, {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("positions", ["completion", "all_text"])
@pytest.mark.parametrize("modality", ["text", "image"])
@pytest.mark.parametrize("method", ["kl_min", "npo", "simnpo", "dpo", "pubg", "biasunlearn"])
def test_states_and_a_second_model_agree(method, modality, positions, make_trainer):
    settings = {"kl_positions": positions, **KL.get(method, {}), **(OFF if method == "biasunlearn" else {})}
    if method == "pubg":
        settings["retain_loss"] = "kl"
    results = {}
    for form in ("precomputed", "model"):
        torch.manual_seed(0)
        trainer = make_trainer(method, modality, reference=form, **settings)
        results[form] = gradients(trainer)
        whole = [stream for stream, need in trainer.references(trainer.args).items() if need == "logits"]
        expected = StatesReference if form == "precomputed" else ModelReference
        assert whole and {type(trainer.reference[stream]) for stream in whole} == {expected}
    (terms, grads), (expected_terms, expected_grads) = results["precomputed"], results["model"]
    for name, value in expected_terms.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-5)
    assert any(name.startswith("kl/") and value.max() > 1e-4 for name, value in terms.items())
    assert grads.keys() == expected_grads.keys()
    for name, value in expected_grads.items():
        torch.testing.assert_close(grads[name], value, atol=1e-5, rtol=1e-5)


def test_a_kl_on_the_forget_set_and_its_text_agrees(make_trainer):
    settings = {"kl_stream": "forget", "kl_positions": "all_text", "kl_direction": "reverse"}
    terms = [gradients(make_trainer("kl_min", reference=form, **settings))[0] for form in ("precomputed", "model")]
    for name, value in terms[1].items():
        torch.testing.assert_close(terms[0][name], value, atol=1e-5, rtol=1e-5)


def test_bfloat16_on_request_is_half_the_file_and_near(make_trainer, tmp_path):
    terms, sizes = [], []
    for dtype in (None, "bfloat16"):
        trainer = make_trainer("kl_min", reference="precomputed", reference_dtype=dtype)
        terms.append(gradients(trainer)[0]["kl/retain"])
        sizes.append(trainer.reference["retain"].held.states.nbytes)
    torch.testing.assert_close(terms[1], terms[0], atol=1e-2, rtol=1e-2)
    assert not torch.equal(*terms)
    tables = StatesWriter.HEADER_BYTES + 24 * 5  # starts, lengths and log-probabilities of five rows
    files = sorted(path.stat().st_size for path in (tmp_path / "references").iterdir())
    assert sizes[0] == 2 * sizes[1] and files == [tables + sizes[1], tables + sizes[0]]


def test_the_head_is_the_models_own_where_it_is_frozen_and_a_copy_where_not(make_trainer):
    lora = make_trainer("kl_min", peft_config=LoraConfig(r=2), reference="precomputed")
    lora.prepare_reference()
    assert lora.reference["retain"].head is lora.model.get_base_model().lm_head
    full = make_trainer("kl_min", reference="precomputed")
    full.prepare_reference()
    head = full.reference["retain"].head
    assert head is not full.model.lm_head and torch.equal(head.weight, full.model.lm_head.weight)
    with torch.no_grad():
        full.model.lm_head.weight.add_(1)
    assert not torch.equal(head.weight, full.model.lm_head.weight)
    assert not any(weight.requires_grad for weight in head.parameters())


def test_the_file_is_kept_told_of_and_remade_for_what_it_depends_on(make_trainer, tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def files():
        return set((tmp_path / "references").glob("*.safetensors"))

    for more, expected in (({}, 1), ({}, 1), ({"kl_positions": "all_text"}, 2), ({"append_eos": False}, 3)):
        make_trainer("kl_min", reference="precomputed", max_steps=1, **more).train()
        assert len(files()) == expected
    assert "Reference hidden states of the retain set take 0.0 MiB" in caplog.text
    make_trainer("kl_min", reference="precomputed", max_steps=1, num_forget=3).train()
    assert len(files()) == 3  # the forget set is no part of it


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is a folder without room for anything")
def test_without_room_on_the_disk_a_second_model_is_used_and_said(make_trainer, caplog):
    settings = {"reference": "precomputed", "retain_loss": "kl", "max_steps": 1, "reference_cache_dir": "/sys"}
    trainer = make_trainer("npo", **settings)
    trainer.train()
    assert isinstance(trainer.reference["retain"], ModelReference)
    assert "and 0.0 MiB are free there" in caplog.text and "reference='model' is used instead" in caplog.text
    assert isinstance(trainer.reference["forget"], PrecomputedReference)  # in memory
    assert "Reference log-probabilities of the forget set cannot be kept in /sys" in caplog.text
    lora = make_trainer("npo", peft_config=LoraConfig(r=2), **settings)
    lora.train()
    assert isinstance(lora.reference["retain"], AdapterReference)


@pytest.mark.parametrize("room", [18_000, 10])
def test_a_disk_that_fills_up_while_writing_leaves_no_half_file(room, make_trainer, tmp_path, caplog):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer = make_trainer("kl_min", reference="precomputed", max_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        trainer.prepare_reference()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert isinstance(trainer.reference["retain"], ModelReference)
    assert "File too large" in caplog.text and not [*(tmp_path / "references").iterdir()]
    trainer.train()


@pytest.mark.parametrize("fault", ["cut off", "a bit", "other rows", "other layout"])
def test_a_file_that_does_not_fit_is_refused_and_made_anew(fault, make_trainer, tmp_path, caplog):
    def made(**more):
        trainer = make_trainer("kl_min", reference="precomputed", max_steps=1, **more)
        trainer.prepare_reference()
        return trainer.reference["retain"].held

    first = made()
    (path,) = (tmp_path / "references").iterdir()
    states, data = first.states.clone(), bytearray(path.read_bytes())
    if fault == "other rows":
        made(append_eos=False)
        (other,) = set((tmp_path / "references").iterdir()) - {path}
        data = other.read_bytes()
    elif fault == "other layout":
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        lengths, parts = first.lengths + 1, {"starts": first.starts, "logps": first.logps.double(), "states": states}
        metadata["checksums"] = json.dumps({name: checksum(v) for name, v in {**parts, "lengths": lengths}.items()})
        save_file({**parts, "lengths": lengths}, path, metadata)
        data = path.read_bytes()
    else:
        data[-1] ^= 1 * (fault == "a bit")
    path.unlink()
    path.write_bytes(data[: -4 if fault == "cut off" else None])
    caplog.clear()
    again = made()
    assert f"{path} is not read" in caplog.text
    words = {"other rows": "other append_eos (False, expected True)", "other layout": "states, expected"}
    assert words.get(fault, "damaged") in caplog.text
    assert torch.equal(again.states, states)
    caplog.clear()
    assert torch.equal(made().states, states) and not caplog.text


def test_another_model_tokenizer_set_or_setting_is_named(make_trainer, tiny_llama, tmp_path, caplog):
    def message(**more):
        caplog.clear()
        make_trainer("kl_min", **{"reference": "precomputed", "max_steps": 1, **more}).prepare_reference()
        return caplog.text

    assert not message()
    model = load_model(str(tiny_llama))
    model.lm_head.weight.data += 0.01
    assert "other model weights (" in message(model=model)
    model = load_model(str(tiny_llama))
    model.config.rms_norm_eps *= 2  # the same weights compute something else
    assert "other model settings (" in message(model=model)
    assert "other max_length (None, expected 64)" in message(max_length=64)
    assert "other positions (completion, expected all_text)" in message(kl_positions="all_text")
    assert "other dtype (float32, expected bfloat16)" in message(reference_dtype="bfloat16")
    rows = [{"prompt": "Who?", "completion": " Nobody."}] * 2
    assert "other rows (5 with digest" in message(datasets={"forget_dataset": rows, "retain_dataset": rows})
    trainer = make_trainer("kl_min", reference="precomputed", max_steps=1)
    trainer.collator.processing_class.add_tokens(["zzz"])
    trainer.prepare_reference()
    assert "other tokenizer or processor (" in caplog.text
    assert not message() and len([*(tmp_path / "references").iterdir()]) == 8


def test_auto_takes_a_second_model_where_the_run_is_too_short_for_every_row(make_trainer, text_rows):
    sets = {"forget_dataset": text_rows(6, "f"), "retain_dataset": text_rows(9, "r")}
    modes = [make_trainer("kl_min", datasets=sets, max_steps=n).reference_mode("retain") for n in (4, 5)]
    assert modes == ["model", "precomputed"]  # two rows a step: 8 and 10 of 9


@pytest.mark.parametrize("reference", ["auto", "precomputed"])
def test_sharded_weights_keep_no_states_and_the_log_says_so(reference, make_trainer, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert make_trainer("kl_min", reference=reference).reference_mode("retain") == "model"
    assert "Hidden states are not kept under ZeRO-3 and FSDP: the reference of the KL on retain" in caplog.text
    assert "reference='model' is used instead" in caplog.text
    caplog.clear()
    make_trainer("kl_min", peft_config=LoraConfig(r=2))  # takes its adapter anyway
    make_trainer("npo", reference="precomputed")  # has no KL
    assert "Hidden states" not in caplog.text


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2vl", "blip2", "minigpt4"])
def test_every_family_shows_what_its_head_is_given(family, tiny_family, text_rows, image_rows):
    folder = str(tiny_family(family))
    model, collate = load_model(folder).eval(), CompletionCollator(load_processor(folder))
    for rows in [text_rows(3, "t")] + ([image_rows(3, "i")] if family != "llama" else []):
        with torch.no_grad():
            output, states = forward_states(model, collate(rows))
        torch.testing.assert_close(frozen_head(model.requires_grad_(False))(states), output.logits, atol=1e-5, rtol=0)
        assert len(states) == len(output.targets)


SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.mark.parametrize("cap", [None, 0.05])
@pytest.mark.parametrize("kind", ["gpt2", "mistral", "gemma2"])
def test_a_cap_behind_the_head_is_found_out(kind, cap):
    if (kind != "gemma2") and cap:
        pytest.skip("no such setting")
    torch.manual_seed(0)
    more = {"intermediate_size": 16, "num_key_value_heads": 2}
    model = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=16, n_layer=2, n_head=2)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, **more)),
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, **more, head_dim=8, final_logit_softcapping=cap)),
    }[kind]().eval()
    ids = torch.arange(3, 15).view(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": ids % 6 > 2}
    with torch.no_grad():
        if cap:
            with pytest.raises(StatesUnavailable, match="a scale or a cap"):
                forward_states(model, batch)
        else:
            output, _ = forward_states(model, batch)
            torch.testing.assert_close(output.logits, forward_completions(model, batch).logits)


def test_a_model_without_a_head_is_named():
    with pytest.raises(StatesUnavailable, match="SimpleModel names no output head"):
        frozen_head(type("SimpleModel", (nn.Module,), {"get_output_embeddings": lambda self: None})())


def test_rows_that_changed_are_named():
    held = SimpleNamespace(take=lambda rows: torch.zeros(3, 4))
    batch = {"input_ids": torch.ones(1, 5).long(), "completion_mask": torch.tensor([[0, 0, 0, 1, 1]])}
    with pytest.raises(ValueError, match=r"Rows \[7\] have 2 positions, their reference was computed with 3"):
        StatesReference(held, nn.Linear(4, 9), torch.float32).output(None, batch | {"index": torch.tensor([7])})
