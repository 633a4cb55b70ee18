"""What every trainer owes on the families that `test_contract.py` does not train: pictures and text together."""

import math

import pytest
import torch
from peft import LoraConfig

from biasunlearn_trainer.models import group_of, load_model, load_processor, module_groups
from biasunlearn_trainer.trainers.registry import METHODS, get_method

FAMILIES = ("qwen2vl", "blip2", "minigpt4")
TRAINED = ["language_model", "connector"]


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def run(make_trainer, method, model, folder, resume=None, **settings):
    torch.manual_seed(0)
    trainer = make_trainer(
        method, "image", model=model, num_forget=4, max_steps=2, output_dir=str(folder), save_strategy="steps",
        save_steps=1, **settings,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_trains_resumes_and_comes_back(method, family, tiny_family, make_trainer, image_rows, text_rows, tmp_path):
    folder = str(tiny_family(family))
    model = load_model(folder)
    before = weights(model)
    trainer = run(make_trainer, method, model, tmp_path / "whole", trainable_groups=TRAINED)
    after = weights(trainer.model)

    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    terms = [key for key in first if key.startswith(("loss/", "kl/"))]
    assert "loss/forget" in terms and all(math.isfinite(first[key]) for key in terms)
    assert first["loss"] == pytest.approx(sum(trainer.weight(key) * first[key] for key in terms), abs=1e-4)

    groups = module_groups(trainer.model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    trainable = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {group_of(name, groups) for name in moved} == set(TRAINED) and moved <= trainable
    assert len(moved) > 0.9 * len(trainable)

    resumed = run(
        make_trainer, method, load_model(folder), tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-1"),
        trainable_groups=TRAINED,
    )  # fmt: skip
    again = weights(resumed.model)
    assert all(torch.equal(after[name], again[name]) for name in after)

    rows = image_rows(2) + text_rows(2)
    measured = trainer.evaluate(rows)["eval_loss"]
    trainer.save_model(str(tmp_path / "saved"))
    assert evaluate(tmp_path / "saved", rows) == pytest.approx(measured, abs=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["npo", "mmunlearner"])
def test_an_adapter_of_a_family(method, family, tiny_family, make_trainer, image_rows, tmp_path):
    model = load_model(str(tiny_family(family)))
    trainer = run(make_trainer, method, model, tmp_path, peft_config=LoraConfig(r=2), activation_checkpointing=True)
    moved = [name for name, value in trainer.model.named_parameters() if "lora_B" in name and value.any()]
    assert moved and all("language_model" in name for name in moved)
    rows = image_rows(2)
    measured = trainer.evaluate(rows)["eval_loss"]
    trainer.save_model(str(tmp_path / "adapter"))
    assert evaluate(tmp_path / "adapter", rows) == pytest.approx(measured, abs=1e-5)


def evaluate(folder, rows):
    """The loss of what was saved, as another project would load it."""
    trainer_class, config_class = get_method("ga")
    return trainer_class(
        model=load_model(str(folder)),
        args=config_class(output_dir=str(folder / "out"), use_cpu=True, report_to=[], disable_tqdm=True),
        forget_dataset=rows,
        processing_class=load_processor(str(folder)),
    ).evaluate(rows)["eval_loss"]
