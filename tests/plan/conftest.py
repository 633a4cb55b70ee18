"""Recipes on models without weights, and the same runs measured."""

import json
import warnings

import pytest
import torch
import yaml

from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.plan import plan
from biasunlearn_trainer.plan.meter import TensorBytes
from biasunlearn_trainer.recipe import parse_recipe

SIZES = {
    "small": {"vocab_size": 2000, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2},
    "50M": {"vocab_size": 16_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 12},
}
VISION = {
    "small": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "image_size": 48, "patch_size": 8},
    "50M": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "image_size": 96, "patch_size": 8},
}


@pytest.fixture(scope="session")
def saved_model(tiny_llama, tiny_llava, tmp_path_factory):
    """`saved_model(modality, size)`: a random model of a size with the tiny one's processor, saved; built once each."""
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer

    from biasunlearn_trainer.models import model_class

    folders = {}

    def save(modality, size):
        if (modality, size) in folders:
            return folders[modality, size]
        tiny = tiny_llama if modality == "text" else tiny_llava
        config = AutoConfig.from_pretrained(tiny)
        text = config if modality == "text" else config.text_config
        for name, value in SIZES[size].items():
            setattr(text, name, value)
        text.num_attention_heads = text.num_key_value_heads = 8
        text.head_dim, text.max_position_embeddings = text.hidden_size // 8, 2048
        processor = (AutoTokenizer if modality == "text" else AutoProcessor).from_pretrained(tiny)
        if modality == "image":
            for name, value in VISION[size].items():
                setattr(config.vision_config, name, value)
            side = config.vision_config.image_size
            processor.image_processor.size = {"shortest_edge": side}
            processor.image_processor.crop_size = {"height": side, "width": side}
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(f"{modality}_{size}")
        model_class(config)._model_mapping[type(config)](config).save_pretrained(folder)
        processor.save_pretrained(folder)
        folders[modality, size] = folder
        return folder

    return save


@pytest.fixture
def write_recipe(saved_model, text_rows, image_rows, tmp_path):
    """`write_recipe(method, modality, size, **keys)`: a recipe's path, its rows and pictures beside it."""

    def write(method, modality="text", size="small", **keys):
        rows = (text_rows if modality == "text" else image_rows)(8)
        streams = ("forget", "retain", *(["utility"] if method == "biasunlearn" else []))
        for stream in streams:
            lines = []
            for number, row in enumerate(rows):
                row = {**row, "prompt": f"{stream} " + row["prompt"] * 8, "completion": row["completion"] * 3}
                if method == "pubg":
                    row |= {"guidance": row["completion"], "guidance_prompt": row["prompt"] + " Who?"}
                if modality == "image":
                    row["images"][0].save(tmp_path / f"{number}.png")
                    row["images"] = f"{number}.png"
                lines.append(json.dumps(row))
            (tmp_path / f"{stream}.jsonl").write_text("\n".join(lines))
        recipe = {
            "method": method,
            "model_name_or_path": str(saved_model(modality, size)),
            **{f"{stream}_dataset": str(tmp_path / f"{stream}.jsonl") for stream in streams},
            "allow_leakage": True,
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "output_dir": str(tmp_path / "out"),
            "reference_cache_dir": str(tmp_path / "references"),
            "saliency_cache_dir": str(tmp_path / "saliency"),
            **keys,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return str(path)

    return write


@pytest.fixture
def planned_and_measured():
    """`planned_and_measured(path)`: the plan of a recipe, and the peak bytes of tensors while it really trains."""
    from biasunlearn_trainer.runner.data import load_streams
    from biasunlearn_trainer.runner.run import build_trainer, config_and_processor

    def both(path):
        made = plan(parse_recipe([path]))
        recipe = parse_recipe([path])
        model = load_model(recipe.model.model_name_or_path, dtype=recipe.model.dtype)
        trainer, _ = build_trainer(recipe, model, config_and_processor(recipe)[1], load_streams(recipe), [], None)
        trainer.prepare_reference()
        trainer.prepare_saliency()
        held = [*trainer.model.parameters(), *trainer.model.buffers()]
        for part in trainer.reference.values():
            held += [part.table] if hasattr(part, "table") else []
            held += [*part.model.parameters(), *part.model.buffers()] if hasattr(part, "model") else []
        mask = trainer._gradient_mask
        if mask is not None:
            held += [*mask.salient.values(), *getattr(mask, "_kept", {}).values()]
        with warnings.catch_warnings(), TensorBytes(*held) as meter:
            trainer.train()
        return made, meter.peak

    return both
