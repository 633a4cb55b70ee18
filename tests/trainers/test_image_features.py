"""Kept image features instead of pictures: the same terms and gradients, and the encoder runs once per picture."""

import logging
import resource

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer import image_features
from biasunlearn_trainer.collators import CompletionCollator
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.image_features import ImageFeatures
from biasunlearn_trainer.models import load_model, load_processor


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


def step(trainer, precision=None):
    trainer.prepare_reference()
    trainer.model.train()
    torch.manual_seed(1)
    with torch.no_grad():
        for value in trainer.model.parameters():
            if value.requires_grad:
                value.add_(0.02 * torch.randn_like(value))
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in range(2)])
    with torch.autocast("cpu", precision, enabled=precision is not None):
        loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    return terms, {name: value.grad for name, value in trainer.model.named_parameters() if value.grad is not None}


def agree(make, precision=None):
    near = 1e-2 if precision else 1e-5
    (terms, grads), (plain, plain_grads) = step(make(True), precision), step(make(False), precision)
    for name, value in plain.items():
        torch.testing.assert_close(terms[name], value, atol=near, rtol=near)
    assert grads.keys() == plain_grads.keys()
    largest = max(float(value.abs().max()) for value in plain_grads.values())
    for name, value in plain_grads.items():
        torch.testing.assert_close(grads[name], value, atol=near * max(1, largest), rtol=near)


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


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava", "qwen2vl", "blip2", "minigpt4"])
def test_checkpointing_and_autocast_agree(family, precision, tiny_family, make_trainer, image_rows, counted):
    folder = str(tiny_family(family))
    rows = {"forget_dataset": image_rows(4, "f"), "retain_dataset": image_rows(4, "r")}

    def make(is_cached):
        torch.manual_seed(0)
        return make_trainer(
            "kl_min", model=load_model(folder), datasets=rows, peft_config=LoraConfig(r=2), reference="adapter",
            cache_image_features=is_cached, activation_checkpointing=True,
        )  # fmt: skip

    agree(make, precision)
    assert counted


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize("family", ["llava", "qwen2vl", "blip2", "minigpt4"])
def test_rows_with_one_and_with_two_pictures_in_one_batch(family, precision, tiny_family, image_rows, cache, counted):
    folder = str(tiny_family(family))
    model, collate = load_model(folder).requires_grad_(False), CompletionCollator(load_processor(folder))
    one, two, other = image_rows(3, "i")
    rows = [one, {**two, "images": [*two["images"], *one["images"]]}, other]
    if family in ("blip2", "minigpt4"):
        rows = [one, other, one]  # one picture a row is all that they take
    weight = model.get_output_embeddings().weight.requires_grad_(True)
    batch = collate([{**row, "index": i} for i, row in enumerate(rows)])
    features = ImageFeatures(model, cache)
    near = 1e-2 if precision else 1e-5
    results = []
    for times in range(3):  # computed, from the file, plain
        with torch.autocast("cpu", precision, enabled=precision is not None):
            inputs = batch if times == 2 else features.replaced(model, batch)
            output = forward_completions(model, inputs)
        results.append((output.logps, *torch.autograd.grad(output.logps.sum(), weight)))
    assert len(counted) == len(
        {id(picture) for row in rows for picture in row["images"]}
    )  # the picture of two rows counts once
    assert all(torch.equal(first, second) for first, second in zip(results[0], results[1], strict=True))
    for found, plain in zip(results[0], results[2], strict=True):
        torch.testing.assert_close(found, plain, atol=near * max(1, float(plain.detach().abs().max())), rtol=near)


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


def test_other_weights_or_settings_of_the_encoder_read_nothing_and_it_is_said(
    make_trainer, tiny_llava, counted, caplog
):
    for changed in ("nothing", "weights", "settings"):
        model = load_model(str(tiny_llava))
        if changed == "weights":
            model.model.multi_modal_projector.linear_1.weight.data += 0.1
        if changed == "settings":
            model.config.vision_feature_layer = -1
        before = len(counted)
        caplog.clear()
        step(make_trainer("ga", "image", LoraConfig(r=2), model=model, cache_image_features=True))
        assert len(counted) > before
        said = {"nothing": "", "weights": "other encoder weights (", "settings": "other model settings ("}[changed]
        assert said in caplog.text and ("Image features" in caplog.text) is (changed != "nothing")


@pytest.mark.parametrize("fault", ["a bit", "cut off", "gone", "renamed", "half a line"])
def test_a_damaged_file_is_refused_and_its_pictures_made_anew(fault, make_trainer, cache, counted, caplog):
    def run():
        return step(make_trainer("ga", "image", LoraConfig(r=2), cache_image_features=True))

    torch.manual_seed(0)
    expected, _ = run()
    (index,) = cache.rglob("*.jsonl")
    data, first = index.with_suffix(".bin"), len(counted)
    if fault == "a bit":
        data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    elif fault == "cut off":
        data.write_bytes(data.read_bytes()[:-4])
    elif fault == "gone":
        data.unlink()
    elif fault == "renamed":
        index.write_text(index.read_text().replace('\\"precision\\": \\"own', '\\"precision\\": \\"bfloat16'))
    else:
        index.write_text(index.read_text()[:-9])
    caplog.clear()
    torch.manual_seed(0)
    again, _ = run()
    assert len(counted) == first + {"a bit": 1, "cut off": 1, "half a line": 1}.get(fault, first)
    words = {"a bit": "another checksum", "cut off": "cut off", "gone": "No such file", "renamed": "other precision"}
    assert words.get(fault, "") in caplog.text and ("Made anew" in caplog.text) is (fault != "half a line")
    for name, value in expected.items():
        assert torch.equal(again[name], value)
    caplog.clear()
    before = len(counted)
    run()
    assert len(counted) == before


@pytest.mark.parametrize("room", [3000, 10])
def test_a_disk_that_fills_up_is_said_once(room, make_trainer, cache, counted, caplog):
    trainer = make_trainer("ga", "image", LoraConfig(r=2), cache_image_features=True)
    batches = [trainer.data_collator([trainer.train_dataset[draw]])["forget"] for draw in range(5)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        for batch in batches:
            assert "mm_encoder_outputs" in trainer.with_features(trainer.model, batch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caplog.text.count("Image features are not kept any more ([Errno 27] File too large)") == 1


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
