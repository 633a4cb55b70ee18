"""`push_to_hub: true` in a recipe, and `trainer.push_to_hub()`: nothing half-finished, nothing that is not meant."""

import json

import pytest
import yaml
from peft import LoraConfig

from biasunlearn_trainer import NPOConfig, NPOTrainer
from biasunlearn_trainer.hub.upload import HubError
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import main, run

SENT = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


def words(finished_runs, tmp_path, *more, name="me/mine"):
    pushed = ["--push_to_hub", "true", "--hub_model_id", name, "--output_dir", str(tmp_path / "out")]
    return [str(finished_runs / "recipe.yaml"), *pushed, "--use_peft", *more]


def test_a_recipe_publishes_its_run_once_when_it_is_measured(finished_runs, online, tmp_path, capsys):
    settings = [
        "--hub_private_repo",
        "true",
        "--hub_revision",
        "run-1",
        "--save_strategy",
        "steps",
        "--save_steps",
        "1",
    ]
    assert main(words(finished_runs, tmp_path, *settings)) == 0
    assert len(online.commits) == 1 and online.repos["me/mine"]["private"]
    files = online.files(branch="run-1")
    assert {*SENT, "results.json", "recipe.resolved.yaml", "report.png"} <= set(files)
    assert not [name for name in files if "checkpoint" in name or name.endswith(".bin")]
    assert set(json.loads(files["results.json"])) == {"before", "after"}
    assert "[More Information Needed]" not in files["README.md"].decode()
    assert not {"push_to_hub", "hub_model_id"} & set(yaml.safe_load(files["recipe.resolved.yaml"]))
    printed = capsys.readouterr()
    assert "Published: http" in printed.out and online.token not in printed.out + printed.err


def test_a_name_that_is_forbidden_is_known_before_the_model_is_loaded(finished_runs, online, tmp_path, capsys):
    assert main(words(finished_runs, tmp_path, name="them/theirs")) == 2
    said = capsys.readouterr().err
    assert "may not write to them/theirs" in said and "Nothing was trained" in said
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_push_that_fails_at_the_end_loses_nothing(finished_runs, online, tmp_path, capsys):
    online.refusals["commit"] = 500, "down for maintenance"
    assert main(words(finished_runs, tmp_path)) == 1
    said = capsys.readouterr().err
    for word in ("finished and measured, but was not published", "500", f"hub push {tmp_path / 'out'} me/mine"):
        assert word in said
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())) == {"before", "after"}


def test_settings_without_effect_and_tokens_are_refused_without_a_word_of_the_token(finished_runs, online, tmp_path):
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(words(finished_runs, tmp_path, "--hub_strategy", "checkpoint", "--hub_always_push", "true")))
    assert "`hub_strategy`" in str(caught.value) and "`hub_always_push`" in str(caught.value)
    with pytest.raises(RecipeError) as caught:
        parse_recipe(words(finished_runs, tmp_path, "--hub_token", online.token))
    assert "hf auth login" in str(caught.value) and online.token not in str(caught.value)
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        run(parse_recipe(words(finished_runs, tmp_path, name="no name")))
    assert online.requests == []


@pytest.fixture
def trainer(tiny_llama, text_rows, tmp_path):
    def build(**settings):
        args = NPOConfig(
            str(tmp_path / "mine"),
            max_steps=2,
            save_steps=1,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            reference_cache_dir=str(tmp_path),
            **settings,
        )
        data = {"forget_dataset": text_rows(4), "retain_dataset": text_rows(4, "r")}
        return NPOTrainer(str(tiny_llama), args, peft_config=LoraConfig(r=2), **data)

    return build


def test_a_trainer_of_ones_own_publishes_adapter_and_card(trainer, online):
    mine = trainer()
    mine.train()
    address = mine.push_to_hub(license="mit", commit_message="First")
    files = online.files()
    assert set(files) - {".gitattributes", "chat_template.jinja"} == SENT
    assert address.startswith(online.url) and online.commits[0]["message"] == "First"
    card = files["README.md"].decode()
    for word in ("Nothing was measured", "NPO, negative preference", "license: mit"):
        assert word in card
    assert mine.push_to_hub(blocking=False, revision="later").result().startswith(online.url)
    assert set(online.files(branch="later")) >= SENT


def test_numbers_of_other_weights_are_not_put_on_a_card(trainer, finished, online, tmp_path):
    mine = trainer()
    mine.train()
    other = finished()
    for name in ("results.json", "environment.json"):
        (tmp_path / "mine" / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match=r"not those that results\.json was measured on"):
        mine.push_to_hub()
    assert online.commits == []


def test_training_with_push_to_hub_sends_no_checkpoint(trainer, online):
    mine = trainer(push_to_hub=True, hub_model_id="me/mine", hub_strategy="all_checkpoints")
    mine.train()
    assert online.commits == [] and set(online.files()) == {".gitattributes"}
    mine.save_model()
    assert len(online.commits) == 1 and "training_args.bin" not in online.files()


def test_a_trainer_writes_the_same_card_to_its_folder(trainer, tmp_path):
    mine = trainer()
    mine.train()
    mine.save_model()
    mine.create_model_card(tags=["mine"])
    card = (tmp_path / "mine" / "README.md").read_text()
    assert "- mine" in card and "Nothing was measured" in card and "[More Information Needed]" not in card


def test_a_trainer_is_told_at_once_that_its_name_cannot_be(trainer, online):
    with pytest.raises(HubError, match="may not write to them/theirs"):
        trainer(push_to_hub=True, hub_model_id="them/theirs")
    with pytest.raises(ValueError, match="hf auth login"):
        trainer(hub_token=online.token)
