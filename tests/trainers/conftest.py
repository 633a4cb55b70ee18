"""`make_trainer`: any method on a tiny text or image-text model."""

import pytest

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.trainers.registry import get_method


@pytest.fixture
def make_trainer(tiny_llama, tiny_llava, text_rows, image_rows, tmp_path):
    """`make_trainer(method, modality, peft_config=..., num_forget=..., **config)`."""

    def make(method, modality="text", peft_config=None, num_forget=6, model=None, datasets=None, **settings):
        trainer_class, config_class = get_method(method)
        defaults = {
            "output_dir": str(tmp_path / "out"),
            "reference_cache_dir": str(tmp_path / "references"),
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
            if "retain" in trainer_class.streams(args):
                # Text rows beside image rows, as in a real retain set.
                datasets["retain_dataset"] = rows(5, "r") + text_rows(3, "t") * (modality == "image")
        model = model or load_model(str(tiny_llama if modality == "text" else tiny_llava))
        return trainer_class(model=model, args=args, peft_config=peft_config, **datasets)

    return make
