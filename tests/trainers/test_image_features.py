"""Kept image features instead of pictures: the same terms and gradients, and the encoder runs once per picture."""

import logging

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer import image_features
from biasunlearn_trainer.models import load_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BIASUNLEARN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "image_features"


@pytest.fixture
def counted(monkeypatch):
    """How many pictures went through an encoder."""
    seen, compute = [], image_features._computed
    monkeypatch.setattr(image_features, "_computed", lambda model, part: seen.extend(part) or compute(model, part))
    return seen


def step(trainer):
    trainer.prepare_reference()
    trainer.model.train()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in trainer.model.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn_like(value))
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in range(2)])
    loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    return terms, {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}


def agree(make):
    (terms, grads), (plain, plain_grads) = step(make(True)), step(make(False))
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, atol=1e-5, rtol=1e-5)
    assert grads.keys() == plain_grads.keys()
    for name, value in plain_grads.items():
        torch.testing.assert_close(grads[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava", "qwen2vl", "blip2", "minigpt4"])
@pytest.mark.parametrize("lora", [True, False])
def test_features_and_pictures_agree(family, lora, tiny_family, make_trainer, image_rows, counted):
    folder = str(tiny_family(family))
    rows = {"forget_dataset": image_rows(4, "f"), "retain_dataset": image_rows(4, "r")}

    def make(is_cached):
        torch.manual_seed(0)
        adapter = LoraConfig(r=2) if lora else None
        more = {} if lora else {"trainable_groups": ["language_model"]}
        form = "adapter" if lora else "model"
        model = load_model(folder)
        return make_trainer(
            "kl_min", model=model, datasets=rows, peft_config=adapter, reference=form,
            cache_image_features=is_cached, **more,
        )  # fmt: skip

    agree(make)
    first = len(counted)
    assert first > 0
    agree(make)  # what was kept is read by the next run
    assert len(counted) == first


def test_a_run_runs_the_encoder_once_per_picture(make_trainer, image_rows, counted, cache, caplog):
    caplog.set_level(logging.INFO)
    pictures = {row["images"][0].tobytes() for row in image_rows(6, "f") + image_rows(5, "r")}
    more = {"peft_config": LoraConfig(r=2), "cache_image_features": True, "max_steps": 12}
    trainer = make_trainer("ga_diff", "image", **more)
    calls = []
    trainer.model.get_base_model().model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len({image_features._picture_key(*picture) for picture in counted}) == len(counted) <= len(pictures)
    assert 0 < len(calls) < 12
    assert any(cache.rglob("*.bin"))
    make_trainer("ga_diff", "image", **more).train()
    assert "Features of" in caplog.text


def test_other_weights_of_the_encoder_read_nothing(make_trainer, tiny_llava, counted):
    for more in (0.0, 0.1):
        model = load_model(str(tiny_llava))
        model.model.multi_modal_projector.linear_1.weight.data += more
        before = len(counted)
        step(make_trainer("ga", "image", LoraConfig(r=2), model=model, cache_image_features=True))
        assert len(counted) > before


def test_a_full_disk_is_said_once_and_training_goes_on(make_trainer, cache, caplog):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where a folder should be")
    make_trainer("ga", "image", LoraConfig(r=2), cache_image_features=True, max_steps=2).train()
    assert caplog.text.count("Image features are not kept any more") == 1


def test_what_cannot_be_is_said_before_training(make_trainer):
    with pytest.raises(
        ValueError, match=r"needs a frozen vision tower and connector; \d+ of their weights are trained"
    ):
        make_trainer("ga", "image", cache_image_features=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM takes no image features from outside"):
        make_trainer("ga", cache_image_features=True)
