"""Shared prefixes give the scores of rows run one by one, on every family; where they do not, it is found out."""

import copy
import random

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.shared_prefixes import cannot_share

PICTURED = ("llava", "qwen2vl", "blip2", "minigpt4")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MISTRAL = {**SMALL, "num_key_value_heads": 2, "intermediate_size": 48}
TEXT = {
    "gpt2": lambda vocab: GPT2Config(vocab_size=vocab, n_embd=32, n_layer=2, n_head=4),
    "mistral": lambda vocab: MistralConfig(vocab_size=vocab, **MISTRAL, sliding_window=16),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, **MISTRAL),
    "gemma2": lambda vocab: Gemma2Config(
        vocab_size=vocab, **MISTRAL, head_dim=8, sliding_window=16, attn_implementation="eager"
    ),
    "opt": lambda vocab: OPTConfig(vocab_size=vocab, **SMALL, ffn_dim=48, word_embed_proj_dim=32),
}


def questions(pictured=False):
    """Two pictures, two questions about each, three answers to each; the answers apart from their questions."""
    rows = []
    for answer in (" The one.", " The other one.", " No."):
        for colour in ("red", "blue"):
            for question in ("Who was late?", "Who was the tall one?"):
                row = {"prompt": f"Two people stand there. {question}", "completion": answer}
                rows.append({**row, "images": [Image.new("RGB", (32, 32), colour)]} if pictured else row)
    return rows


def both_ways(model, processing_class, rows, batch_size=64, **options):
    """Scores with and without shared prefixes, after checking that they are the same; and the two scorers."""
    shared, plain = (Scorer(model, processing_class, batch_size, share_prefixes=share) for share in (True, False))
    scores, expected = shared.score(rows, **options), plain.score(rows, **options)
    for score, other in zip(scores, expected, strict=True):
        assert score.logp == pytest.approx(other.logp, abs=1e-5)
        assert (score.num_tokens, score.predicted, score.is_greedy) == (
            other.num_tokens,
            other.predicted,
            other.is_greedy,
        )
    return scores, shared, plain


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load_model(tiny_llama), load_processor(tiny_llama)


@pytest.fixture(params=TEXT)
def text_model(request, tiny_llama):
    tokenizer = load_processor(tiny_llama)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(TEXT[request.param](len(tokenizer))), tokenizer


def test_text_models(text_model):
    model, tokenizer = text_model
    _, shared, plain = both_ways(model, tokenizer, questions())
    if getattr(model.config, "sliding_window", None):
        assert shared.num_tokens == plain.num_tokens, "rows longer than the window go one by one"
        few = [{"prompt": "A", "completion": answer} for answer in ("bcdef", "bcxyz", "bcdxy")]
        _, shared, plain = both_ways(model, tokenizer, few * 9)
    assert shared.why_apart == {False: None} and plain.why_apart == {}
    assert shared.num_tokens < 0.6 * plain.num_tokens


@pytest.mark.parametrize("name", PICTURED)
def test_image_text_models(name, tiny_family):
    model, processor = load_model(tiny_family(name)), load_processor(tiny_family(name))
    rows = [*questions(pictured=True), *questions()]
    scores, shared, plain = both_ways(model, processor, rows)
    assert shared.why_apart == {True: None, False: None}
    assert shared.num_tokens < 0.6 * plain.num_tokens
    red, blue = scores[0], scores[2]
    assert abs(red.logp - blue.logp) > 1e-4, "the pictures change nothing"
    both_ways(model, processor, rows, batch_size=5)


def test_a_picture_goes_through_the_vision_tower_once(tiny_llava):
    model, processor = load_model(tiny_llava), load_processor(tiny_llava)
    seen = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len((args or (kwargs["pixel_values"],))[0])), with_kwargs=True
    )
    scorer = Scorer(model, processor)
    scorer.score(questions(pictured=True))
    assert seen == [3, 1, 2], "three rows of one picture to compare, that picture once, then the two of all twelve rows"


def test_several_pictures_a_row(tiny_llava):
    model, processor = load_model(tiny_llava), load_processor(tiny_llava)
    red, blue = (Image.new("RGB", (32, 32), colour) for colour in ("red", "blue"))
    rows = [
        {"prompt": f"<image>\n<image>\n{prompt}", "completion": completion, "images": images}
        for images in ([red, blue], [blue, red], [red, red])
        for prompt in ("Which?", "Why?")
        for completion in (" This.", " That.")
    ]
    _, shared, plain = both_ways(model, processor, rows)
    assert shared.num_tokens < plain.num_tokens


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_random_trees_empty_prompts_and_identical_rows(llama, batch_size):
    draw = random.Random(batch_size)
    rows = []
    for _ in range(60):
        text = "".join(draw.choice("ab") for _ in range(draw.randint(1, 25)))
        cut = draw.randint(0, len(text) - 1)
        rows.append({"prompt": text[:cut], "completion": text[cut:]})
    both_ways(*llama, [*rows, rows[0], rows[0]], batch_size, append_eos=False)
    both_ways(*llama, [rows[0]] * 5, batch_size)
    _, shared, _ = both_ways(*llama, rows[:1], batch_size)
    assert shared.why_apart == {}, "one row has nothing to share and says nothing about the model"


def test_cut_rows(llama):
    rows = [{"prompt": "a long beginning " * n + "the same end", "completion": " and more"} for n in (1, 4, 4, 6)]
    scores, _, _ = both_ways(*llama, rows, max_length=40)
    assert scores[1] == scores[2]
    assert scores[1].logp == pytest.approx(scores[3].logp, abs=1e-5), "cut to the same 40 tokens"


def test_last_tokens_and_likeliest_words(tiny_llava):
    model, processor = load_model(tiny_llava), load_processor(tiny_llava)
    shared, plain = (Scorer(model, processor, share_prefixes=share) for share in (True, False))
    rows = questions(pictured=True)
    choices = [[" an" + end for end in "xyz"]] * len(rows)
    for found, expected in zip(
        shared.score_last_token(rows, choices), plain.score_last_token(rows, choices), strict=True
    ):
        assert found == pytest.approx(expected, abs=1e-5)
    for found, expected in zip(shared.top_choices(rows, 3), plain.top_choices(rows, 3), strict=True):
        assert [ids for ids, _ in found] == [ids for ids, _ in expected]
        for (_, logps), (_, others) in zip(found, expected, strict=True):
            assert logps == pytest.approx(others, abs=1e-5)


def test_eager_attention(llama):
    model = copy.deepcopy(llama[0])
    model.set_attn_implementation("eager")
    _, shared, _ = both_ways(model, llama[1], questions())
    assert shared.why_apart == {False: None}


class Positionless(LlamaForCausalLM):
    """Takes positions and does not use them."""

    def forward(self, *args, position_ids=None, **kwargs):
        """As Llama."""
        return super().forward(*args, **kwargs)


def test_a_model_that_scores_otherwise_is_found_out(llama, caplog):
    model = copy.deepcopy(llama[0])
    for weight in model.parameters():  # an untrained model's positions change little
        weight.data.mul_(4)
    both_ways(model, llama[1], questions())
    model.__class__ = Positionless
    with caplog.at_level("INFO"):
        _, shared, plain = both_ways(model, llama[1], questions())
    assert "differ by" in shared.why_apart[False] and "share no prefixes with Positionless" in caplog.text
    assert shared.num_tokens == plain.num_tokens, "it runs as without"


def test_a_model_that_does_not_ask_for_its_attention_is_found_out(llama, monkeypatch):
    """Its attention would look for the whole row where there are blocks; where there was one block it would fit."""
    usual = LlamaAttention.forward

    def forward(self, *args, **kwargs):
        told, self.config = self.config, LlamaConfig(attn_implementation="sdpa")
        try:
            return usual(self, *args, **kwargs)
        finally:
            self.config = told

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    _, shared, plain = both_ways(*llama, questions())
    assert "it raises RuntimeError" in shared.why_apart[False] and shared.num_tokens == plain.num_tokens
    assert llama[0].config._attn_implementation == "sdpa", "what was there before is there again"


def test_models_that_take_no_positions_or_no_mask_run_row_by_row(llama):
    tokenizer = llama[1]
    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    )
    _, shared, _ = both_ways(bloom, tokenizer, questions())
    assert shared.why_apart == {False: "it takes no position_ids"}
    model = copy.deepcopy(llama[0])
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2) takes no mask" in cannot_share(model)
