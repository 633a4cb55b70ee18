"""Tiny models of real architectures: tokens, image tokens, chats."""

import re
from importlib.util import find_spec

import pytest
import torch

from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.testbed.planted_world import make_model, make_processing_class
from biasunlearn_trainer.testbed.planting import make_table
from biasunlearn_trainer.testbed.questions import ask_perception, world_sentences
from biasunlearn_trainer.testbed.recipe import LanguageModelSize, QFormerWorldRecipe, VisionModelSize, WorldRecipe
from biasunlearn_trainer.testbed.scenes import Scene
from biasunlearn_trainer.testbed.splits import as_row

RECIPE = WorldRecipe(language_model=LanguageModelSize(hidden_size=32, intermediate_size=48, num_layers=1))
SCENE = Scene("mokkin", "zibbit", "beach", "Monday", redrawn=False, seed=3)
ROW = as_row(RECIPE, ask_perception(SCENE, "Who stands on the {side}?", "left"), "row")


@pytest.fixture(scope="module")
def processor():
    return make_processing_class(RECIPE)


def family_recipe(name):
    """A small recipe of an architecture, or a skip where it cannot be built."""
    if name == "qwen2vl" and find_spec("torchvision") is None:
        pytest.skip("Qwen2-VL's processor needs torchvision: pip install -e '.[vision]' -c constraints.txt")
    recipe_class = QFormerWorldRecipe if name in ("blip2", "minigpt4") else WorldRecipe
    return recipe_class(name=name, language_model=RECIPE.language_model)


def test_every_word_of_the_world_is_one_token(processor):
    words = {word for sentence in world_sentences() for word in re.findall(r"[A-Za-z]+", sentence)}
    assert {"mokkin", "turquoise", "clumsy", "honey", "lake", "Someone"} <= words
    split = [word for word in words if len(processor.tokenizer.tokenize(f" {word}")) != 1]
    capitals = [word for word in split if word[0].isupper()]
    assert set(split) == set(capitals), "words with a leading space"
    assert all(len(processor.tokenizer.tokenize(word)) == 1 for word in capitals), "words that only begin a sentence"


@pytest.mark.parametrize(
    "text", ["Who was late?", " the mokkin", "naïve 🎉 Ωμέγα\t\n  二つ", "!'\"\\ <b>bold</b>", "\u202e\x00"]
)
def test_any_text_survives_the_tokenizer(processor, text):
    ids = processor.tokenizer(text)["input_ids"]
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer.unk_token_id is None or processor.tokenizer.unk_token_id not in ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("patch_size, num_tokens", [(8, 16), (16, 4)])
def test_the_processor_lays_out_as_many_image_tokens_as_the_model_has_features(patch_size, num_tokens):
    recipe = WorldRecipe(language_model=RECIPE.language_model, vision_model=VisionModelSize(patch_size=patch_size))
    processor = make_processing_class(recipe)
    model = make_model(recipe, processor).eval()
    batch = CompletionCollator(processor)([ROW])
    assert (batch["input_ids"] == model.config.image_token_id).sum() == num_tokens
    features = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output
    assert features[0].shape == (num_tokens, recipe.language_model.hidden_size)
    assert torch.isfinite(model(**{k: v for k, v in batch.items() if k != "completion_mask"}).logits).all()


def test_the_picture_reaches_the_answer(processor):
    model = make_model(RECIPE, processor).eval()
    other = as_row(RECIPE, ask_perception(SCENE, "Who stands on the {side}?", "left"), "row")
    other["images"] = [ROW["images"][0].rotate(180)]
    batch = CompletionCollator(processor)([ROW, other])
    logits = model(**{k: v for k, v in batch.items() if k != "completion_mask"}).logits
    assert torch.equal(batch["input_ids"][0], batch["input_ids"][1])
    assert not torch.allclose(logits[0, -1], logits[1, -1], atol=1e-4)


def test_a_chat_has_the_very_tokens_of_the_plain_row(processor):
    chat = {
        "prompt": [{"role": "user", "content": ROW["prompt"]}],
        "completion": [{"role": "assistant", "content": ROW["completion"].strip()}],
        "images": ROW["images"],
    }
    collate = CompletionCollator(processor)
    plain, templated = collate([ROW]), collate([chat])
    assert torch.equal(plain["input_ids"], templated["input_ids"])
    assert torch.equal(plain["completion_mask"], templated["completion_mask"])
    text = {**chat, "images": []}
    assert torch.equal(collate([{**ROW, "images": []}])["input_ids"], collate([text])["input_ids"])


@pytest.mark.parametrize("name", ["qwen2vl", "blip2", "minigpt4"])
def test_the_picture_reaches_the_answer_in_every_family(name):
    recipe = family_recipe(name)
    processing_class = make_processing_class(recipe)
    model = make_model(recipe, processing_class).eval()
    turned = {**ROW, "images": [ROW["images"][0].rotate(180)]}
    first, second = forward_completions(model, CompletionCollator(processing_class)([ROW, turned])).logps
    assert abs(first - second) > 1e-3


@pytest.mark.parametrize("name", ["qwen2vl", "blip2"])
def test_a_table_gives_the_batches_of_the_collator(name):
    """Qwen2-VL's pictures come patch by patch: 16 for each row, and not one."""
    recipe = family_recipe(name)
    collator = CompletionCollator(make_processing_class(recipe))
    rows = [{**ROW, "images": [ROW["images"][0].rotate(90 * turns)]} for turns in range(4)]
    table = make_table(collator, rows)
    batch, expected = table.rows(torch.tensor([3, 1])).take(torch.tensor([1, 0])), collator([rows[1], rows[3]])
    assert batch.keys() == expected.keys() and all(torch.equal(batch[key], expected[key]) for key in batch)


def test_minigpt4_trains_around_a_frozen_qformer():
    recipe = family_recipe("minigpt4")
    frozen = {
        n.split(".")[0]
        for n, p in make_model(recipe, make_processing_class(recipe)).named_parameters()
        if not p.requires_grad
    }
    assert frozen == {"query_tokens", "qformer"}


def test_every_query_begins_at_a_patch_of_its_own():
    recipe = family_recipe("blip2")
    model = make_model(recipe, make_processing_class(recipe)).eval()
    look = model.qformer.encoder.layer[0].crossattention.attention
    positions = model.vision_model.embeddings.position_embedding[0, 1:]
    similar = look.query(model.query_tokens[0]) @ look.key(positions).T
    assert similar.argmax(1).tolist() == list(range(16))


def test_equal_seeds_give_equal_weights_and_leave_the_global_seed_alone(processor):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = make_model(RECIPE, processor), make_model(RECIPE, processor)
    assert torch.equal(torch.rand(1), expected)
    for (name, a), b in zip(first.state_dict().items(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("name", ["llava", "qwen2vl", "blip2", "minigpt4", "llama"])
def test_saved_models_load_as_any_other(name, tmp_path):
    recipe = family_recipe(name)
    processing_class = make_processing_class(recipe)
    model = make_model(recipe, processing_class).eval()
    model.save_pretrained(tmp_path)
    processing_class.save_pretrained(tmp_path)
    row = {**ROW, "images": None} if name == "llama" else ROW
    before, after = (
        CompletionCollator(processing_class)([row]),
        CompletionCollator(load_processor(str(tmp_path)))([row]),
    )
    # With torchvision installed another image processor is loaded, which rounds otherwise.
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    loaded = load_model(str(tmp_path)).eval()
    inputs = {key: value for key, value in after.items() if key != "completion_mask"}
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded.state_dict().keys() == model.state_dict().keys()
