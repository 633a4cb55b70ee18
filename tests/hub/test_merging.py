"""Merged models of real runs: a base in 4 bits, and a model for pictures."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from biasunlearn_trainer.hub import merge
from biasunlearn_trainer.hub.__main__ import main
from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.recipe import parse_recipe
from biasunlearn_trainer.runner import run
from biasunlearn_trainer.runner.models import load_for_run

LORA = ["--use_peft", "--lora_r", "4"]


@pytest.fixture(scope="module")
def quantised_run(recipe_file):
    """The recipe of a QLoRA run that is finished."""
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    words = [*LORA, "--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--dtype", "float32"]
    recipe = parse_recipe([str(recipe_file), "--output_dir", str(recipe_file.parent / "qlora"), *words])
    run(recipe)
    return recipe


@pytest.fixture(scope="module")
def pictured_run(recipe_file, tiny_llava, image_rows):
    """The folder of a LLaVA run that is finished."""
    rows, folder = image_rows(6), recipe_file.parent / "pictures"
    folder.mkdir()
    for number, row in enumerate(rows):
        row["images"][0].save(folder / f"{number}.png")
        row["images"] = f"{number}.png"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model_name_or_path", str(tiny_llava), "--forget_dataset", str(folder / "rows.jsonl"), *LORA]
    run(parse_recipe([str(recipe_file), "--output_dir", str(recipe_file.parent / "llava"), *words]))
    return recipe_file.parent / "llava"


def test_an_adapter_trained_on_four_bits_goes_into_the_dequantised_weights(quantised_run, tiny_llama, tmp_path, caplog):
    output = quantised_run.training.output_dir
    merge(output, tmp_path / "merged")
    assert "merged into the dequantised weights" in caplog.text
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not hasattr(merged.config, "quantization_config") and merged.dtype == torch.float32
    measured = load_for_run(quantised_run, str(output)).eval()
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, measured(ids).logits, rtol=1e-4, atol=1e-4)
    # The original weights lie elsewhere: what was trained is beside the rounding, not beside them.
    name = "model.layers.0.mlp.up_proj.weight"
    change = merged.get_parameter(name) - load_model(str(tiny_llama)).get_parameter(name)
    adapter = load_file(f"{output}/adapter_model.safetensors")
    down, up = (adapter[f"base_model.model.model.layers.0.mlp.up_proj.lora_{part}.weight"] for part in "AB")
    scale = measured.get_submodule("base_model.model.model.layers.0.mlp.up_proj").scaling["default"]
    assert (change - scale * up @ down).abs().max() > 1e-3


def test_a_merged_llava_says_the_same_about_a_picture(pictured_run, image_rows, tmp_path):
    assert main(["merge", str(pictured_run), str(tmp_path / "merged")]) == 0
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    row = image_rows(2)[1]
    batch = processor(text=f"<image>\n{row['prompt']}", images=row["images"], return_tensors="pt")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").eval()
    measured = load_model(str(pictured_run)).eval()
    with torch.no_grad():
        found, expected = merged(**batch).logits, measured(**batch).logits
        with measured.disable_adapter():
            before = measured(**batch).logits
    assert (found - expected).abs().max() <= 1e-5 < (before - expected).abs().max()


def test_a_llava_run_is_written_with_its_processor(pictured_run, tmp_path):
    assert main(["push", str(pictured_run), "me/mine", "--dry_run", str(tmp_path / "there")]) == 0
    files = {path.name for path in (tmp_path / "there").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "processor_config.json", "README.md"}
    assert AutoProcessor.from_pretrained(tmp_path / "there").image_token == "<image>"
    card = (tmp_path / "there" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "AutoModelForImageTextToText" in card
