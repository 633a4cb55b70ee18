"""Streams that go through the model together give what they give apart."""

import math

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer.collators import form_of, join_batches
from biasunlearn_trainer.completions import forward_completions
from biasunlearn_trainer.trainers import passes
from biasunlearn_trainer.trainers.registry import METHODS


def step(trainer, monkeypatch):
    """Terms and gradients of a step, and the rows of each pass of the policy with gradients."""
    seen = []
    trainer.prepare_reference()
    trainer.prepare_saliency()
    plain = trainer._policy_pass

    def counted(model, batch, num_masked):
        seen.append(len(batch["input_ids"]))
        return plain(model, batch, num_masked)

    monkeypatch.setattr(trainer, "_policy_pass", counted)
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in (0, 1)])
    trainer.model.eval()
    loss, terms = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    loss.backward()
    gradients = {name: w.grad for name, w in trainer.model.named_parameters() if w.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, gradients, seen


def assert_same_step(first, second):
    for mine, other in zip(first, second, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            torch.testing.assert_close(mine[name], other[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize(("modality", "lora"), [("text", False), ("image", True)])
@pytest.mark.parametrize("method", METHODS)
def test_together_is_apart(method, modality, lora, make_trainer, alike, monkeypatch):
    monkeypatch.setattr(passes, "LARGEST_WASTE", 9)  # however much padding

    def run(joint):
        torch.manual_seed(0)
        trainer = make_trainer(
            method, modality, LoraConfig(r=2) if lora else None, datasets=alike(method, modality), joint_forward=joint
        )
        return trainer, step(trainer, monkeypatch)

    trainer, (*together, joint) = run(True)
    _, (*apart, single) = run(False)
    assert_same_step(together, apart)
    # Only where there are pictures do masked rows go apart.
    streams = [s for s in trainer.streams(trainer.args) if modality == "text" or not trainer.is_masked(s)]
    assert sum(joint) == sum(single), "a pass over rows that nothing reads"
    assert len(single) == len(trainer.streams(trainer.args))
    assert len(joint) == len(single) - len(streams) + 1


@pytest.mark.parametrize("positions", ["completion", "all_text"])
@pytest.mark.parametrize("reference", ["model", "precomputed", "adapter"])
@pytest.mark.parametrize("method", ["npo", "kl_min"])
def test_with_a_kl_on_one_of_the_streams(method, reference, positions, make_trainer, alike, monkeypatch):
    def run(joint):
        torch.manual_seed(0)
        kl = {"retain_loss": "kl"} if method == "npo" else {}
        trainer = make_trainer(
            method, "text", LoraConfig(r=2, init_lora_weights=False) if reference == "adapter" else None,
            datasets=alike(method, "text"), joint_forward=joint, reference=reference, kl_positions=positions, **kl,
        )  # fmt: skip
        return step(trainer, monkeypatch)

    *together, joint = run(True)
    *apart, single = run(False)
    assert_same_step(together, apart)
    assert (len(joint), len(single)) == (1, 2)


def test_lengths_that_differ_go_apart(make_trainer, text_rows, monkeypatch):
    long = [{**row, "prompt": row["prompt"] * 3} for row in text_rows(4, "r")]
    trainer = make_trainer("ga_diff", datasets={"forget_dataset": text_rows(4, "f"), "retain_dataset": long})
    assert len(step(trainer, monkeypatch)[-1]) == 2


def test_pictures_beside_text_go_apart(make_trainer, text_rows, image_rows, monkeypatch):
    sets = {"forget_dataset": image_rows(4, "f"), "retain_dataset": text_rows(4, "r")}
    assert len(step(make_trainer("ga_diff", "image", datasets=sets), monkeypatch)[-1]) == 2


def test_the_longest_goes_alone_and_the_others_together(make_trainer, alike, text_rows, monkeypatch):
    long = [{**row, "prompt": row["prompt"] * 3} for row in text_rows(4, "u")]
    trainer = make_trainer("biasunlearn", datasets=alike("biasunlearn", "text") | {"utility_dataset": long})
    trainer.prepare_reference()
    batch = trainer.data_collator([trainer.train_dataset[draw] for draw in (0, 1)])
    assert [sorted(group) for group in trainer._count([batch]).groups] == [["utility"], ["forget", "retain"]]
    assert len(step(trainer, monkeypatch)[-1]) == 2


def test_the_choice_is_of_the_whole_accumulated_batch(make_trainer, text_rows):
    rows = text_rows(4, "f")
    long = [{**row, "prompt": row["prompt"] * (3 if i == 3 else 1)} for i, row in enumerate(text_rows(4, "r"))]
    trainer = make_trainer("ga_diff", datasets={"forget_dataset": rows, "retain_dataset": long})
    batches = [trainer.data_collator([trainer.train_dataset[draw] for draw in draws]) for draws in ((0, 1), (2, 3))]
    alone = [len(trainer._count([batch]).groups) for batch in batches]
    assert sorted(alone) == [1, 2] and len(trainer._count(batches).groups) == 2


def test_nothing_is_kept_of_a_batch(make_trainer, alike, monkeypatch):
    trainer = make_trainer("ga_diff", datasets=alike("ga_diff", "text"))
    step(trainer, monkeypatch)
    assert trainer._outputs == {}


def test_parts_of_a_joint_batch_are_the_batches(make_trainer, text_rows):
    collate = make_trainer("ga").collator
    short, long = collate(text_rows(2, "a")), collate([{**text_rows(1, "b")[0], "completion": " " + "yes " * 9}])
    assert short["input_ids"].shape[1] != long["input_ids"].shape[1] and form_of(short) == form_of(long)
    joint = join_batches([short, long], pad_token_id=0)
    torch.manual_seed(0)
    model = make_trainer("ga").model.eval()
    parts = forward_completions(model, joint).split([2, 1])
    for part, batch in zip(parts, (short, long), strict=True):
        alone = forward_completions(model, batch)
        assert torch.equal(part.mask, alone.mask) and torch.equal(part.targets, alone.targets)
        torch.testing.assert_close(part.logits, alone.logits)
        torch.testing.assert_close(part.token_logps, alone.token_logps)


def test_what_cannot_be_joined(make_trainer, text_rows, image_rows):
    collate = make_trainer("ga", "image").collator
    pictured, plain = collate(image_rows(1, "a")), collate(text_rows(1, "a"))
    assert form_of(pictured) != form_of(plain)
    other_size = {**pictured, "pixel_values": pictured["pixel_values"][..., :-1]}
    assert form_of(pictured) == form_of(collate(image_rows(2, "b"))) != form_of(other_size)


def test_the_loss_is_finite_in_training(make_trainer, alike):
    trainer = make_trainer("npo", datasets=alike("npo", "text"), num_train_epochs=1, max_steps=2)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
