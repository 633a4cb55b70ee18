"""The streamed Fisher diagonal against gradients taken one at a time."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.saliency.fisher import add_squared_gradients, empty_sums


@pytest.fixture
def llama(tiny_llama):
    return load_model(str(tiny_llama)).eval(), CompletionCollator(load_processor(str(tiny_llama)))


def gradients_of(model, batch):
    """d(mean over rows of NLL per token)/d(weight), by plain autograd."""
    output = forward_completions(model, batch)
    loss = -(output.token_logps.sum(1) / output.mask.sum(1)).mean()
    weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return dict(zip(weights, torch.autograd.grad(loss, weights.values()), strict=True))


@pytest.mark.parametrize("rows_at_once", [1, 3])
def test_sums_are_squared_gradients(rows_at_once, llama, text_rows):
    model, collator = llama
    batches = [collator(text_rows(6)[start : start + rows_at_once]) for start in range(0, 6, rows_at_once)]
    sums = empty_sums(model)
    for batch in batches:
        add_squared_gradients(model, batch, sums)
    expected = [gradients_of(model, batch) for batch in batches]
    for name, value in sums.items():
        torch.testing.assert_close(value, sum(g[name] ** 2 for g in expected), rtol=1e-5, atol=1e-12)


def test_no_gradient_stays_behind(llama, text_rows):
    model, collator = llama
    add_squared_gradients(model, collator(text_rows(2)), empty_sums(model))
    assert all(value.grad is None for value in model.parameters())
    # And no hook: an ordinary backward leaves its gradients where they belong.
    forward_completions(model, collator(text_rows(2))).logps.sum().backward()
    assert all(value.grad is not None for value in model.parameters())


def test_a_tied_weight_has_one_entry_for_both_of_its_uses(llama, text_rows):
    model, collator = llama
    model.lm_head.weight = model.model.embed_tokens.weight
    sums, batch = empty_sums(model), collator(text_rows(2))
    add_squared_gradients(model, batch, sums)
    assert "lm_head.weight" not in sums
    expected = gradients_of(model, batch)["model.embed_tokens.weight"] ** 2
    torch.testing.assert_close(sums["model.embed_tokens.weight"], expected)


def test_a_lora_adapter_at_its_start_has_no_gradient_in_a(llama, text_rows):
    model, collator = llama
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    sums = empty_sums(model)
    add_squared_gradients(model, collator(text_rows(2)), sums)
    assert len(sums) == 4
    assert all(("lora_A" in name) == (value.abs().max() == 0) for name, value in sums.items())


def test_bfloat16_is_summed_in_float32(llama, text_rows):
    model, collator = llama
    model = model.bfloat16()
    sums = empty_sums(model)
    add_squared_gradients(model, collator(text_rows(2)), sums)
    assert {value.dtype for value in sums.values()} == {torch.float32} and all(v.any() for v in sums.values())


def test_float16_and_frozen_models_are_refused(llama):
    model, _ = llama
    with pytest.raises(ValueError, match=r"float16.*float32 or bfloat16"):
        empty_sums(model.half())
    with pytest.raises(ValueError, match="no trainable weight"):
        empty_sums(model.requires_grad_(False))
