"""All rows of a batch in one backward pass: the same Fisher as with one backward pass for each row."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.saliency.fisher import PerSampleFisher, adding_to, add_squared_gradients, empty_sums
from biasunlearn_trainer.saliency.per_sample import row_gradients
from biasunlearn_trainer.saliency.rows import InseparableRows, Layouts

FAMILIES = ("llama", "llava", "qwen2vl", "blip2", "minigpt4")


def collating(folder):
    collator = CompletionCollator(load_processor(str(folder)))

    def collate(rows):
        return {**collator(rows), "num_images": torch.tensor([len(row.get("images", [])) for row in rows])}

    return collate


def one_by_one(model, collate, rows):
    sums = empty_sums(model)
    for row in rows:
        add_squared_gradients(model, collate([row]), sums)
    return sums


def at_once(model, collate, rows):
    sums = empty_sums(model)
    row_gradients(model, collate(rows), [*sums], adding_to(sums))
    return sums


def assert_same(found, expected):
    """To 1e-5 of a weight's own largest value; gradients that are 0 but for rounding to as much of the largest of all."""
    largest = max(value.max() for value in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).abs().max()
        assert error <= 1e-5 * value.max() + 1e-12 * largest, f"{name}: {error / value.max():.1e}"


def perturbed(model):
    """No weight is 0: neither biases, query tokens nor the B of adapters."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    return model.eval()


@pytest.fixture
def family(tiny_family, image_rows, text_rows):
    """`family(name, pictured)`: model, collate, rows whose completions differ in length."""

    def make(name, pictured=True):
        folder = tiny_family(name)
        rows = image_rows(5) if pictured and name != "llama" else text_rows(5)
        return perturbed(load_model(str(folder))), collating(folder), rows

    return make


@pytest.mark.parametrize("pictured", [True, False])
@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, tuning, pictured, family):
    if name == "llama" and pictured:
        pytest.skip("Llama takes no pictures")
    model, collate, rows = family(name, pictured)
    if tuning == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)).eval()
        model = perturbed(model)
    expected = one_by_one(model, collate, rows)
    trained = [value.requires_grad for value in model.parameters()]
    found = at_once(model, collate, rows)
    assert_same(found, expected)
    assert [value.requires_grad for value in model.parameters()] == trained
    assert all(value.grad is None for value in model.parameters())
