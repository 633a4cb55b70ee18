"""The command that builds a recipe's mask, and what a run with a mask leaves behind."""

import json
import logging

import pytest
import yaml

from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run
from biasunlearn_trainer.runner.mask import MASK_FILE, main, make_mask
from biasunlearn_trainer.saliency import SaliencyMask

FILES = {"saliency.md", "saliency.json", "saliency.png"}


@pytest.fixture
def recipe(tmp_path, tiny_llama):
    """`recipe(*words)`: a command line for two steps of MMUnlearner on texts, or of the method in `words`."""
    for name, answer in (("forget", " The tall one."), ("retain", " Blue.")):
        rows = [{"prompt": f"{name} {i}?", "completion": f"{answer}{i}"} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "method": "mmunlearner",
        "model_name_or_path": str(tiny_llama),
        "forget_dataset": str(tmp_path / "forget.jsonl"),
        "retain_dataset": str(tmp_path / "retain.jsonl"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "disable_tqdm": True,
        "case_studies": 0,
        "output_dir": str(tmp_path / "out"),
        "saliency_cache_dir": str(tmp_path / "masks"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return lambda *words: [str(path), *words]


def fails(capsys, arguments):
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_the_command_writes_what_a_run_then_finds_in_the_cache(recipe, tmp_path, capsys, caplog):
    assert main(recipe("--output", str(tmp_path / "shown"))) == 0
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "shown").iterdir()} == FILES | {MASK_FILE}
    mask = SaliencyMask.load(tmp_path / "shown" / MASK_FILE)
    data = json.loads((tmp_path / "shown" / "saliency.json").read_text())["salient"]
    assert (data["covered"], data["chosen"]) == (mask.num_weights, mask.num_salient)
    assert sum(place["chosen"] for place in data["places"]) == mask.num_salient
    said = f"{mask.num_salient:,} of {mask.num_weights:,} covered weights"
    assert said in printed and "| language_model |" in printed
    text = (tmp_path / "shown" / "saliency.md").read_text()
    assert said in text and "Threshold 1, Fisher per_sample, 6 rows to forget, 6 to preserve." in text
    (cached,) = (tmp_path / "masks").iterdir()
    caplog.set_level(logging.INFO, "biasunlearn_trainer.kept_files")
    run(parse_recipe(recipe()))
    assert f"Saliency mask of the run: {cached}" in caplog.text and len(list((tmp_path / "masks").iterdir())) == 1
    # The run says the same, and its report shows it.
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    assert json.loads((tmp_path / "out" / "saliency.json").read_text())["salient"] == data
    report = (tmp_path / "out" / "report.md").read_text()
    assert said in report and "![Saliency](saliency.png)" in report and report.index("# ") == 0


def test_finished_runs_beside_the_mask(recipe, tmp_path, capsys):
    """A whole model and an adapter; of both the n weights that changed most, n as in the mask."""
    whole, adapter = str(tmp_path / "whole"), str(tmp_path / "adapter")
    run(parse_recipe(recipe("--method", "ga_diff", "--output_dir", whole)))
    assert not (tmp_path / "whole" / "saliency.md").exists()
    run(parse_recipe(recipe("--method", "ga_diff", "--use_peft", "true", "--output_dir", adapter)))
    found = make_mask(parse_recipe(recipe()), str(tmp_path / "shown"), [whole, adapter])
    data = json.loads((tmp_path / "shown" / "saliency.json").read_text())["most_changed"]
    assert [entry["run"] for entry in data] == [whole, adapter]
    for entry in data:
        assert entry["asked"] == found.total.chosen
        assert sum(place["chosen"] for place in entry["places"]) == pytest.approx(entry["n"])
    # LoRA is on the linear layers; embeddings, norms and head stay as they are.
    changed = {place["kind"]: place["chosen"] for place in data[1]["places"]}
    assert changed["embed_tokens"] == changed["lm_head"] == changed["input_layernorm"] == 0 < changed["mlp.up_proj"]
    assert f"Most changed by {whole}" in capsys.readouterr().out


def test_a_run_of_another_model_is_refused(recipe, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    assert "neither model.safetensors nor adapter_config.json" in fails(capsys, recipe("--changed_in", str(folder)))
    (folder / "environment.json").write_text(json.dumps({"model": {"source": "theirs", "fingerprint": "00"}}))
    assert "began with theirs (fingerprint 00)" in fails(capsys, recipe("--changed_in", str(folder)))


def test_modules_for_lora_are_ranked_without_an_adapter(recipe, tmp_path, capsys):
    words = ["--use_peft", "true", "--modules", "2", "--output", str(tmp_path / "shown")]
    assert main(recipe(*words)) == 0
    printed = capsys.readouterr().out
    (line,) = [line for line in printed.splitlines() if line.startswith("lora_target_modules:")]
    names = yaml.safe_load(line)["lora_target_modules"]
    assert len(names) == 2 and all(name.startswith("model.layers.") for name in names)
    assert not any("lora" in name for name in SaliencyMask.load(tmp_path / "shown" / MASK_FILE).shapes)
    listed = json.loads((tmp_path / "shown" / "saliency.json").read_text())["modules"]
    assert [module["name"] for module in listed] == names
    assert listed[0]["share"] >= listed[1]["share"]
    assert line in (tmp_path / "shown" / "saliency.md").read_text()


def test_a_lora_recipe_shows_the_mask_of_its_adapter(recipe, tmp_path):
    found = make_mask(parse_recipe(recipe("--use_peft", "true")), str(tmp_path / "shown"))
    assert {place.kind.split(".")[0] for place in found.shares} == {"self_attn", "mlp"}


@pytest.mark.parametrize("mask", ["random", "file"])
def test_other_masks_of_a_recipe(mask, recipe, tmp_path):
    shown = tmp_path / "shown"
    fisher = make_mask(parse_recipe(recipe()), str(shown))
    chosen = "random" if mask == "random" else str(shown / MASK_FILE)
    found = make_mask(parse_recipe(recipe("--saliency_mask", chosen)), str(tmp_path / "again"))
    assert found.shares == fisher.shares
    assert ("drawn at random" in (tmp_path / "again" / "saliency.md").read_text()) == (mask == "random")


def test_faults_are_told_before_anything_is_loaded(recipe, capsys, tmp_path):
    said = fails(capsys, recipe("--method", "ga_diff", "--modules", "0"))
    assert "2 faults" in said and "saliency_mask: the recipe has none" in said and "--modules: at least 1" in said
    assert "quantised weights" in fails(capsys, recipe("--modules", "1", "--load_in_4bit", "true"))
    assert "learning_rate" in fails(capsys, recipe("--learnig_rate", "1"))
    assert "float16" in fails(capsys, recipe("--dtype", "float16"))
    SaliencyMask.empty().save(tmp_path / "empty.safetensors")
    with pytest.raises(RecipeError, match=r"lora_B\.default\.weight has no entry"):
        make_mask(parse_recipe(recipe("--saliency_mask", str(tmp_path / "empty.safetensors"), "--use_peft", "true")))
