"""`make_trainer`: any method on a tiny text or image-text model."""

import pytest

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.trainers.registry import get_method
from biasunlearn_trainer.trainers.steering import BiasReading


@pytest.fixture
def make_trainer(tiny_llama, tiny_llava, text_rows, image_rows, tmp_path):
    """`make_trainer(method, modality, peft_config=..., num_forget=..., **config)`."""

    def make(method, modality="text", peft_config=None, num_forget=6, model=None, datasets=None, **settings):
        trainer_class, config_class = get_method(method)
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "reference_cache_dir": str(tmp_path / "references"),
            "saliency_cache_dir": str(tmp_path / "saliency"),
            "per_device_train_batch_size": 2,
            "max_steps": 3,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": [],
            "use_cpu": True,
            "disable_tqdm": True,
        }
        args = config_class(**{**defaults, **settings})
        rows = text_rows if modality == "text" else image_rows
        if datasets is None:
            datasets = {"forget_dataset": rows(num_forget, "f")}
            # Text rows beside image rows, as in a real retain set.
            other = rows(5, "r") + text_rows(3, "t") * (modality == "image")
            if "retain" in trainer_class.streams(args):
                datasets["retain_dataset"] = other
            if method == "pubg":
                datasets["forget_dataset"] = guided(datasets["forget_dataset"])
            if method == "biasunlearn":
                datasets = bias_pairs(rows(num_forget, "f"), rows(num_forget, "r")) | {"utility_dataset": other}
                datasets["bias_probe"] = one_type_swapped
        model = model or load_model(str(tiny_llama if modality == "text" else tiny_llava))
        return trainer_class(model=model, args=args, peft_config=peft_config, **datasets)

    make.folder = tmp_path
    return make


@pytest.fixture
def alike(text_rows, image_rows):
    """The sets of a method, all of about one length and one modality."""

    def make(method, modality):
        rows = text_rows if modality == "text" else image_rows
        forget, others = rows(4, "f"), rows(4, "r")
        if method == "pubg":
            forget = guided(forget)
        if method == "biasunlearn":
            return bias_pairs(forget, others) | {"utility_dataset": rows(4, "u"), "bias_probe": one_type_swapped}
        has_retain = "retain" in get_method(method)[0].streams(get_method(method)[1](output_dir="x"))
        return {"forget_dataset": forget} | ({"retain_dataset": others} if has_retain else {})

    return make


def guided(rows):
    """Rows with reference answers of different lengths; the original model stands behind every second one."""
    return [
        {
            **row,
            "guidance": "A person in " + "red, " * (i % 3) + "blue.",
            "guidance_prompt": f"Only what is seen! {row['prompt']}" if i % 2 else None,
        }
        for i, row in enumerate(rows)
    ]


def bias_pairs(stereotypes, anti_stereotypes):
    """Rows as pairs of two bias types in turn."""
    types = [{"bias_type": ("race", "gender")[i % 2], "pair_id": str(i)} for i in range(len(stereotypes))]
    sides = {"forget_dataset": stereotypes, "retain_dataset": anti_stereotypes}
    return {name: [row | extra for row, extra in zip(side, types, strict=True)] for name, side in sides.items()}


def one_type_swapped(model):
    """A probe that finds race over-debiased, gender still biased, and never an end."""
    return {"race": BiasReading(40.0, 90.0, 500), "gender": BiasReading(70.0, 90.0, 500)}
