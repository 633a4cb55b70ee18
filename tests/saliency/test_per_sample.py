"""All rows of a batch in one backward pass: the same Fisher as with one backward pass for each row."""

import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.saliency.fisher import PerSampleFisher, add_squared_gradients, adding_to, empty_sums
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
    """To 1e-5 of a weight's own largest value; what is 0 but for rounding, to a small share of the largest of all."""
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


CASES = [(name, tuning, True) for name in FAMILIES for tuning in ("full", "lora")]
CASES += [(name, "full", False) for name in FAMILIES if name != "llama"]


@pytest.mark.parametrize(("name", "tuning", "pictured"), CASES)
def test_every_family(name, tuning, pictured, family):
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


def test_checkpointed_layers_count_once(family):
    model, collate, rows = family("llava")
    expected = one_by_one(model, collate, rows)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()  # else nothing is checkpointed; these models have no dropout
    assert_same(at_once(model, collate, rows), expected)


def test_the_gradients_of_a_tied_head_and_embedding_are_added_before_they_are_squared(family):
    model, collate, rows = family("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    expected = one_by_one(model, collate, rows)
    found = at_once(model, collate, rows)
    assert "lm_head.weight" not in found
    assert_same(found, expected)


def test_so_are_those_of_a_layer_that_is_run_twice(family):
    model, collate, rows = family("llama")
    model.model.layers[1] = model.model.layers[0]
    assert_same(at_once(model, collate, rows), one_by_one(model, collate, rows))


def test_gpt2(tiny_llama, text_rows):
    """Tied, positions looked up once for all rows, matrices the other way round."""
    config = GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=2, n_positions=64)
    model, collate, rows = perturbed(GPT2LMHeadModel(config)), collating(tiny_llama), text_rows(4)
    assert_same(at_once(model, collate, rows), one_by_one(model, collate, rows))


def test_parts_of_a_matrix_add_up_to_it(family, monkeypatch):
    monkeypatch.setattr("biasunlearn_trainer.saliency.per_sample.ELEMENTS_AT_ONCE", {"cpu": 100})
    model, collate, rows = family("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    assert_same(at_once(model, collate, rows), one_by_one(model, collate, rows))


def test_bfloat16(family):
    model, collate, rows = family("llava")
    expected = at_once(model, collate, rows)
    found = at_once(model.bfloat16(), collate_in(torch.bfloat16, collate), rows)
    for name in ("lm_head.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        assert found[name].dtype == torch.float32
        assert (found[name] - expected[name]).norm() < 0.1 * expected[name].norm()


def collate_in(dtype, collate):
    return lambda rows: {k: v.to(dtype) if v.is_floating_point() else v for k, v in collate(rows).items()}


class PastTheModule(nn.Module):
    """Uses a weight in a way that no hook on its module sees, as DoRA and packed attention do."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        return nn.functional.linear(hidden_states, self.inner.weight)


class MixesRows(nn.Module):
    """Lays all rows out as one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states):
        return self.inner(hidden_states.flatten(0, 1)[None])[0].view(
            hidden_states.shape[0], -1, self.inner.out_features
        )


@pytest.mark.parametrize("wrap", [PastTheModule, MixesRows])
def test_what_cannot_be_told_apart_is_taken_one_by_one(wrap, family, caplog):
    caplog.set_level(logging.INFO)
    model, collate, rows = family("llama")
    model.model.layers[1].mlp.up_proj = wrap(model.model.layers[1].mlp.up_proj)
    sums = empty_sums(model)
    fisher = PerSampleFisher(model, collate, sums)
    fisher.add(rows[:3])
    fisher.add(rows[3:])
    assert_same(sums, one_by_one(model, collate, rows))
    (record,) = [record for record in caplog.records if "one by one" in record.getMessage()]
    assert "1 weights would get other values, the first model.layers.1.mlp.up_proj.inner" in record.getMessage()


def test_known_models_are_not_taken_one_by_one(family, caplog):
    caplog.set_level(logging.INFO)
    model, collate, rows = family("llava")
    sums = empty_sums(model)
    fisher = PerSampleFisher(model, collate, sums)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    fisher.add(rows[:3])
    assert len(calls) == 4, "the first three rows both ways"
    fisher.add(rows[3:])
    assert len(calls) == 5 and "one by one" not in caplog.text
    assert_same(sums, one_by_one(model, collate, rows))


def test_a_batch_whose_rows_cannot_be_told_apart_is_taken_one_by_one(family):
    model, collate, rows = family("llava")
    sums = empty_sums(model)
    fisher = PerSampleFisher(model, collate, sums)
    fisher.add(rows[:2])
    # The class token of a picture is no longer that of a row.
    rows[3] = {**rows[3], "images": rows[3]["images"] * 2}
    with pytest.raises(InseparableRows, match="class_embedding"):
        at_once(model, collate, rows[2:])
    fisher.add(rows[2:])
    assert_same(sums, one_by_one(model, collate, rows))


def test_a_row_may_have_several_pictures_where_no_token_is_added_to_each(family):
    model, collate, rows = family("llava")
    model.model.vision_tower.requires_grad_(False)
    rows[3] = {**rows[3], "images": rows[3]["images"] * 2}
    assert_same(at_once(model, collate, rows), one_by_one(model, collate, rows))


def test_layouts():
    batch = {
        "input_ids": torch.zeros(3, 7),
        "completion_mask": torch.tensor([[0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]),
        "pixel_values": torch.zeros(112, 5),
        "num_images": torch.tensor([1, 2, 1]),
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 8], [1, 6, 8]]),
    }
    layouts = Layouts(batch)
    assert layouts.of(3, False) == (1, 1, 1)
    assert layouts.of(21, False) == (7, 7, 7)
    assert layouts.of(4, False) == (1, 2, 1)
    assert layouts.of(112, False) == (16, 48, 48) and layouts.of(28, False) == (4, 12, 12)
    assert layouts.of(6, True) == (2, 3, 1)
    with pytest.raises(InseparableRows, match="6 entries"):
        layouts.of(6, False)
    assert not layouts.one_each
    # As many images as rows, but not one each: which of the two four entries are cannot be told.
    batch["num_images"] = torch.tensor([2, 0, 1])
    batch["image_grid_thw"] = batch["image_grid_thw"][:3]
    with pytest.raises(InseparableRows, match="more than one"):
        Layouts(batch).of(3, False)
