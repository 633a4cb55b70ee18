"""What every trainer owes, on a tiny text and a tiny image-text model."""

import json
import math

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.trainers.registry import METHODS, get_method

MODALITIES = ("text", "image")


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def changed(before, model):
    return {name for name, value in model.named_parameters() if not torch.equal(before[name], value)}


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("method", METHODS)
def test_trains_logs_and_moves_what_is_trainable(method, modality, make_trainer):
    trainer = make_trainer(method, modality)
    before = weights(trainer.model)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    terms = [key for key in first if key.startswith(("loss/", "kl/"))]
    assert "loss/forget" in terms and all(math.isfinite(first[key]) for key in terms)
    assert first["loss"] == pytest.approx(sum(trainer.weight(key) * first[key] for key in terms), abs=1e-4)
    assert {f"logps/{stream}" for stream in trainer.streams(trainer.args)} <= set(first)
    moved = changed(before, trainer.model)
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    # A picture's patches reach the text through attention alone; biases of keys cancel in the softmax.
    still = {name for name in trainable - moved if "k_proj.bias" not in name}
    unused = {name for name in still if "patch" not in name}
    assert moved <= trainable and not (unused if modality == "text" else set())
    assert len(moved) > 0.9 * len(trainable)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("method", METHODS)
def test_lora_saves_loads_and_evaluates(method, modality, make_trainer, text_rows, image_rows, tmp_path):
    trainer = make_trainer(method, modality, peft_config=LoraConfig(r=2))
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved and all(("lora_" in name and "language_model" in name) or modality == "text" for name in moved)
    rows = (text_rows if modality == "text" else image_rows)(4)
    measured = trainer.evaluate(rows)["eval_loss"]
    both = trainer.evaluate({"a": rows, "b": rows[:1]})
    assert both["eval_a_loss"] == pytest.approx(measured) and both["eval_b_loss"] != measured
    trainer.save_model(str(tmp_path / "saved"))
    loaded = get_method("ga")[0](
        model=load_model(str(tmp_path / "saved")),
        args=get_method("ga")[1](output_dir=str(tmp_path / "x"), use_cpu=True, report_to=[]),
        forget_dataset=rows,
        processing_class=load_processor(str(tmp_path / "saved")),
    )
    assert loaded.evaluate(rows)["eval_loss"] == pytest.approx(measured, abs=1e-6)


def test_frozen_groups_stay_as_they_were(make_trainer):
    trainer = make_trainer("npo", "image", trainable_groups=["connector"])
    before = weights(trainer.model)
    trainer.train()
    moved = changed(before, trainer.model)
    assert moved and all("multi_modal_projector" in name for name in moved)


def test_groups_may_be_named_by_hand(make_trainer):
    """Another cut of the model: its image side as one part, for full fine-tuning and for LoRA."""
    named = {
        "language_model": ["model.language_model", "lm_head"],
        "eyes": ["model.vision_tower", "model.multi_modal_projector"],
    }
    for groups in (named, json.dumps(named)):
        trainer = make_trainer("ga", "image", module_groups=groups, trainable_groups=["eyes"])
        before = weights(trainer.model)
        trainer.train()
        moved = changed(before, trainer.model)
        assert moved and all("vision_tower" in name or "projector" in name for name in moved)
    trainer = make_trainer("ga", "image", LoraConfig(r=2), module_groups=named, trainable_groups=["eyes"])
    adapted = [name for name, value in trainer.model.named_parameters() if value.requires_grad]
    assert any("projector" in name for name in adapted) and not any("language_model" in name for name in adapted)
    with pytest.raises(ValueError, match="no module group 'ears'"):
        make_trainer("ga", "image", module_groups=named, trainable_groups=["ears"])


def test_lora_goes_on_the_groups_that_are_named(make_trainer):
    trainer = make_trainer("ga", "image", peft_config=LoraConfig(r=2), trainable_groups=["vision_tower"])
    adapted = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert adapted and all("vision_tower" in name for name in adapted)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_changes_nothing(name, make_trainer):
    losses = []
    for checkpointing in (False, True):
        trainer = make_trainer("npo", "image", **{name: checkpointing})
        assert not checkpointing or trainer.args.activation_checkpointing_kwargs["use_reentrant"] is False
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_checkpointing_with_lora(make_trainer):
    losses = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        trainer = make_trainer("npo", "text", LoraConfig(r=2), activation_checkpointing=checkpointing)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][0] != losses[0][-1]


def test_bf16_trains(make_trainer):
    trainer = make_trainer("npo", "text", bf16=True)
    trainer.train()
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)


def test_a_subclass_may_override_compute_loss_outright(make_trainer, tiny_llama, text_rows, tmp_path):
    from biasunlearn_trainer import GAConfig, GATrainer
    from biasunlearn_trainer.completions import forward_completions

    class Own(GATrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return forward_completions(model, inputs["forget"]).logps.mean()

    def gradient(steps, batch):
        args = GAConfig(
            str(tmp_path), max_steps=1, per_device_train_batch_size=batch, gradient_accumulation_steps=steps,
            use_cpu=True, report_to=[], logging_steps=1, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = Own(model=str(tiny_llama), args=args, forget_dataset=text_rows(4))
        trainer.train()
        return trainer.state.log_history[0]["grad_norm"]

    assert gradient(2, 2) == pytest.approx(gradient(1, 4), rel=1e-4)


def test_conversational_rows_with_images_just_work(make_trainer, image_rows):
    rows = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "images": row["images"],
        }
        for row in image_rows(4)
    ]
    trainer = make_trainer("npo", "image", datasets={"forget_dataset": rows, "retain_dataset": rows})
    trainer.train()
    assert trainer.state.global_step == 3
    trainer = make_trainer("dpo", "image", datasets={"forget_dataset": rows, "retain_dataset": rows})
    trainer.train()
    assert trainer.state.global_step == 3


def test_ten_lines_from_another_project(tiny_llama, tmp_path):
    from datasets import Dataset

    from biasunlearn_trainer import NPOConfig, NPOTrainer

    forget = Dataset.from_list([{"prompt": "Who was late?", "completion": " The tall one."}] * 4)
    retain = Dataset.from_list([{"prompt": "Snow is", "completion": " white."}] * 3)
    args = NPOConfig(
        str(tmp_path), beta=0.1, max_steps=2, use_cpu=True, report_to=[], reference_cache_dir=str(tmp_path)
    )
    trainer = NPOTrainer(
        model=str(tiny_llama), args=args, forget_dataset=forget, retain_dataset=retain, peft_config=LoraConfig(r=2)
    )
    trainer.train()
    assert trainer.state.global_step == 2
