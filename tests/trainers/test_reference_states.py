"""A KL's reference as hidden states on disk and the frozen head."""

import errno
import logging
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from biasunlearn_trainer import reference as reference_module
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.reference import AdapterReference, ModelReference, PrecomputedReference
from biasunlearn_trainer.reference_states import StatesReference, StatesUnavailable, forward_states, frozen_head

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
        terms.append(gradients(make_trainer("kl_min", reference="precomputed", reference_dtype=dtype))[0]["kl/retain"])
        sizes.append(max(path.stat().st_size for path in (tmp_path / "references").glob("*.bin")) if not sizes else 0)
    torch.testing.assert_close(terms[1], terms[0], atol=1e-2, rtol=1e-2)
    assert not torch.equal(*terms)
    assert sorted(path.stat().st_size for path in (tmp_path / "references").glob("*.bin")) == [sizes[0] / 2, sizes[0]]


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
        return set((tmp_path / "references").glob("*.bin"))

    for more, expected in (({}, 1), ({}, 1), ({"kl_positions": "all_text"}, 2), ({"append_eos": False}, 3)):
        make_trainer("kl_min", reference="precomputed", max_steps=1, **more).train()
        assert len(files()) == expected
    assert "Reference hidden states of the retain set take 0.0 MiB" in caplog.text
    make_trainer("kl_min", reference="precomputed", max_steps=1, num_forget=3).train()
    assert len(files()) == 3  # the forget set is no part of it
    whole = {path: path.stat().st_size for path in files()}
    for path in files():
        path.write_bytes(b"cut")
    trainer = make_trainer("kl_min", reference="precomputed", max_steps=1)
    trainer.train()
    assert isinstance(trainer.reference["retain"], StatesReference)
    assert sum(path.stat().st_size == size for path, size in whole.items()) == 1


def test_without_room_on_the_disk_a_second_model_is_used_and_said(make_trainer, tmp_path, monkeypatch, caplog):
    usage = namedtuple("usage", "total used free")(10**6, 10**6, 10)
    monkeypatch.setattr(reference_module.shutil, "disk_usage", lambda path: usage)
    trainer = make_trainer("npo", reference="precomputed", retain_loss="kl", max_steps=1)
    trainer.train()
    assert isinstance(trainer.reference["retain"], ModelReference)
    assert isinstance(trainer.reference["forget"], PrecomputedReference)
    assert "0.0 MiB are free there" in caplog.text and "reference='model' is used instead" in caplog.text
    lora = make_trainer("npo", peft_config=LoraConfig(r=2), reference="precomputed", retain_loss="kl", max_steps=1)
    lora.train()
    assert isinstance(lora.reference["retain"], AdapterReference)


def test_a_disk_that_fills_up_while_writing_leaves_no_half_file(make_trainer, tmp_path, monkeypatch, caplog):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(reference_module, "_append", lambda file, states: full)
    trainer = make_trainer("kl_min", reference="precomputed", max_steps=1)
    trainer.train()
    assert isinstance(trainer.reference["retain"], ModelReference)
    assert "No space left" in caplog.text and not [*(tmp_path / "references").iterdir()]


def test_auto_takes_a_second_model_where_the_run_is_too_short_for_every_row(make_trainer, text_rows):
    sets = {"forget_dataset": text_rows(6, "f"), "retain_dataset": text_rows(9, "r")}
    modes = [make_trainer("kl_min", datasets=sets, max_steps=n).reference_mode("retain") for n in (4, 5)]
    assert modes == ["model", "precomputed"]  # two rows a step: 8 and 10 of 9


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
