"""Masked and unmasked rows in one pass: m * (gradient of the first) + (gradient of the others), weight by weight."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.saliency.mixed_rows import MixedRows
from biasunlearn_trainer.saliency.rows import InseparableRows

NUM_MASKED = 2


@pytest.fixture
def batch(tiny_llama, text_rows):
    """Five rows; completions and prompts differ in length."""
    rows = [{**row, "prompt": row["prompt"] + "so " * i} for i, row in enumerate(text_rows(5))]
    return CompletionCollator(load_processor(str(tiny_llama)))(rows)


def perturbed(model):
    """No weight is 0, so that no gradient is."""
    torch.manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            if value.is_floating_point():
                value += 0.05 * torch.randn_like(value)
    return model.eval()


def made(model_type, **settings):
    """A tiny model of a family; its tokens are bytes."""
    common = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
    torch.manual_seed(0)
    return perturbed(AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**common, **heads, **settings)))


def salient_in(model):
    generator = torch.Generator().manual_seed(0)
    trained = ((name, value) for name, value in model.named_parameters() if value.requires_grad)
    return {name: torch.rand(value.shape, generator=generator) < 0.5 for name, value in trained}


def taken(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def rows_of(batch, rows):
    return {name: value[rows] for name, value in batch.items()}


def apart(model, salient, batch):
    """The slow way: two passes, and the mask over all that came of the first."""
    first = taken(model, -forward_completions(model, rows_of(batch, slice(NUM_MASKED))).logps.sum())
    others = taken(model, forward_completions(model, rows_of(batch, slice(NUM_MASKED, None))).logps.sum())
    return {name: salient[name] * first[name] + others[name] for name in others}


def mixed(model, salient, batch):
    with MixedRows(model, salient, batch, NUM_MASKED).running():
        logps = forward_completions(model, batch).logps
    return taken(model, logps[NUM_MASKED:].sum() - logps[:NUM_MASKED].sum())


def assert_same(model, batch, atol=1e-5):
    salient = salient_in(model)
    expected = apart(model, salient, batch)
    found = mixed(model, salient, batch)
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= atol * largest, name
    return expected


FAMILIES = ("llama", "qwen2", "qwen3", "gemma", "gemma2", "mistral", "phi3", "olmo2", "granite")


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_language_models(family, tuning, batch):
    model = made(family)
    if tuning == "lora":
        model = perturbed(get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.5)))
    assert_same(model, batch)


@pytest.mark.parametrize("family", ["llava", "qwen2vl", "blip2", "minigpt4"])
def test_image_text_models_on_text(family, tiny_family, text_rows):
    folder = tiny_family(family)
    batch = CompletionCollator(load_processor(str(folder)))(text_rows(5))
    assert_same(perturbed(load_model(str(folder))), batch)


def test_gpt2(batch):
    """Tied, positions looked up once for all rows, matrices the other way round, biases, a norm of torch's own."""
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=2, n_positions=128)
    assert "transformer.wpe.weight" in assert_same(perturbed(GPT2LMHeadModel(config)), batch)


def test_completions_of_one_token(tiny_llama, text_rows):
    """Then the head is called on as many entries as there are rows."""
    rows = [{**row, "completion": "."} for row in text_rows(5)]
    batch = CompletionCollator(load_processor(str(tiny_llama)), append_eos=False)(rows)
    assert batch["completion_mask"].sum(1).tolist() == [1] * 5
    assert_same(made("llama"), batch)


class ByKeyword(nn.Module):
    """Calls a layer with the name of its argument."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(input=hidden)


def test_a_layer_that_is_called_by_keyword(batch):
    model = made("llama")
    model.model.layers[1].mlp.up_proj = ByKeyword(model.model.layers[1].mlp.up_proj)
    assert_same(model, batch)


def test_a_tied_head_and_a_layer_that_is_run_twice(batch):
    model = made("llama", tie_word_embeddings=True)
    model.model.layers[1] = model.model.layers[0]
    assert "lm_head.weight" not in assert_same(model, batch)


def test_an_embedding_whose_padding_gets_no_gradient(batch):
    model = made("llama")
    model.model.embed_tokens.padding_idx = int(batch["input_ids"][0, 3])
    expected = assert_same(model, batch)
    assert not expected["model.embed_tokens.weight"][model.model.embed_tokens.padding_idx].any()


def test_pieces_of_a_matrix_are_all_of_it(batch, monkeypatch):
    monkeypatch.setattr("biasunlearn_trainer.saliency.per_sample.ELEMENTS_AT_ONCE", {"cpu": 100})
    assert_same(made("llama", tie_word_embeddings=True), batch)


@pytest.mark.parametrize("number", [1, 4])
def test_however_many_are_masked(number, batch, monkeypatch):
    monkeypatch.setattr(f"{__name__}.NUM_MASKED", number)
    assert_same(made("llama"), batch)


def test_bfloat16_and_autocast(batch):
    model = made("llama")
    exact = apart(model, salient_in(model), batch)

    def gap(found):
        names = ("lm_head.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight")
        return max((found[name].float() - exact[name]).norm() / exact[name].norm() for name in names)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mixed(model, salient_in(model), batch)
    assert gap(found) < 0.05 and {value.dtype for value in found.values()} == {torch.float32}
    found = mixed(model.bfloat16(), salient_in(model), batch)
    assert gap(found) < 0.05 and {value.dtype for value in found.values()} == {torch.bfloat16}


def test_biases_alone(batch):
    model = made("qwen2")
    for name, value in model.named_parameters():
        value.requires_grad_(name.endswith("bias"))
    assert len(assert_same(model, batch)) == 6


def test_the_model_is_left_as_it_was(batch):
    model = made("llama")
    weights, forwards = dict(model.named_parameters()), [vars(module).get("forward") for module in model.modules()]
    mixed(model, salient_in(model), batch)
    with pytest.raises(RuntimeError, match="broken"), MixedRows(model, salient_in(model), batch, 2).running():
        raise RuntimeError("broken")
    assert all(value is weights[name] for name, value in model.named_parameters())
    assert [vars(module).get("forward") for module in model.modules()] == forwards


class Overwritten(nn.Module):
    """Changes what a layer gave where it stands."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return nn.functional.relu(self.inner(hidden).mul_(2), inplace=True)


def test_outputs_that_are_changed_where_they_stand(batch):
    model = made("llama")
    model.model.layers[1].mlp.up_proj = Overwritten(model.model.layers[1].mlp.up_proj)
    assert_same(model, batch)


class MixesRows(nn.Module):
    """Lays all rows out as one."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden):
        return self.inner(hidden.flatten(0, 1)[None])[0].view(*hidden.shape[:2], -1)


class PositionsFirst(MixesRows):
    """Works on (positions, rows, width)."""

    def forward(self, hidden):
        return self.inner(hidden.transpose(0, 1)).transpose(0, 1)


class OfItsOwn(nn.Module):
    """Has a weight beside a module."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, nn.Parameter(torch.ones(inner.out_features))

    def forward(self, hidden):
        return self.inner(hidden) * self.scale


class PastTheModule(MixesRows):
    """Uses a module's weight without calling it."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.inner.weight)


class InAFunction(MixesRows):
    """Hands a module's weight to a function with a backward of its own."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, weight):
            ctx.save_for_backward(hidden, weight)
            return hidden @ weight.T

        @staticmethod
        def backward(ctx, gradient):
            hidden, weight = ctx.saved_tensors
            return gradient @ weight, gradient.flatten(0, 1).T @ hidden.flatten(0, 1)

    def forward(self, hidden):
        return self.Product.apply(hidden, self.inner.weight)


class ScaledBy(nn.Module):
    """Has a weight, and is called with a number, or a number a row, beside the rows."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden, scale):
        return self.weight * hidden * scale.view(-1, 1, 1)


class WithANumber(MixesRows):
    """Scales what a layer gave by a number."""

    number_of = staticmethod(lambda hidden: torch.tensor(2.0))

    def __init__(self, inner):
        super().__init__(inner)
        self.scaled = ScaledBy(inner.out_features)

    def forward(self, hidden):
        return self.scaled(self.inner(hidden), self.number_of(hidden))


class WithANumberARow(WithANumber):
    """Scales each row by a number of its own."""

    number_of = staticmethod(lambda hidden: torch.ones(len(hidden)))


APART = [MixesRows, PositionsFirst, OfItsOwn, PastTheModule, InAFunction, WithANumber, WithANumberARow]


@pytest.mark.parametrize("wrap", APART)
def test_rows_that_cannot_be_told_apart(wrap, batch):
    model = made("llama")
    model.model.layers[1].mlp.up_proj = wrap(model.model.layers[1].mlp.up_proj)
    with pytest.raises(InseparableRows), MixedRows(model, salient_in(model), batch, 2).running():
        forward_completions(model, batch)


def test_experts_go_apart(batch):
    model = made("mixtral", num_local_experts=4, num_experts_per_tok=2)
    with pytest.raises(InseparableRows), MixedRows(model, salient_in(model), batch, 2).running():
        forward_completions(model, batch)
