"""A recipe on the world of made-up people: its base model and forget split are chosen by keys."""

import pytest

from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run
from biasunlearn_trainer.runner.data import resolve_testbed
from biasunlearn_trainer.testbed import RECIPES
from biasunlearn_trainer.testbed.recipe import EntitiesRecipe, LanguageModelSize, VisionModelSize

TINY = EntitiesRecipe(
    num_people=8,
    forget_percents=(25,),
    num_splits=2,
    num_forget=20,
    retain_drawings=1,
    num_sights=4,
    num_pictures=20,
    picture_batch=2,
    text_batch=2,
    steps=1,
    language_model=LanguageModelSize(hidden_size=32, intermediate_size=48, num_layers=1, max_positions=64),
    vision_model=VisionModelSize(hidden_size=32, intermediate_size=48),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def recipe_of(cache, tmp_path, monkeypatch):
    """A two-step recipe on a world of eight people, with further words appended."""
    monkeypatch.setenv("BIASUNLEARN_CACHE", str(cache))
    monkeypatch.setitem(RECIPES, "entities", TINY)
    words = ["--method", "ga_diff", "--testbed", "entities", "--max_steps", "2", "--per_device_train_batch_size", "2"]
    words += ["--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--disable_tqdm", "true"]
    return lambda *more: parse_recipe([*words, *more])


def chosen(recipe):
    resolve_testbed(recipe)
    return recipe.model.model_name_or_path, recipe.run.forget_dataset, recipe.run.tasks[1]


def test_seed_and_split_choose_model_sets_and_tasks(recipe_of):
    model, forget, report = chosen(recipe_of())
    assert forget.endswith("splits/forget25_0/forget")
    assert report.startswith("entities@report=") and report.endswith("splits/forget25_0/report")
    other_model, other_forget, other_report = chosen(recipe_of("--testbed_split", "forget25_1"))
    assert other_model == model
    assert (other_forget, other_report) == (forget.replace("25_0", "25_1"), report.replace("25_0", "25_1"))
    seeded = chosen(recipe_of("--testbed_split", "forget25_1", "--testbed_seed", "1"))
    assert seeded[0] != model and seeded[1].endswith("splits/forget25_1/forget")
    assert chosen(recipe_of("--testbed_seed", "0")) == (model, forget, report)


def test_any_set_of_the_split_can_be_named(recipe_of):
    recipe = recipe_of("--testbed_split", "forget25_1", "--retain_dataset", "testbed:preserve")
    resolve_testbed(recipe)
    assert recipe.run.retain_dataset.endswith("splits/forget25_1/preserve")


def test_faults_name_the_key(recipe_of):
    with pytest.raises(RecipeError, match="testbed_split: testbed entities has no split 'forget10_0'; there are"):
        resolve_testbed(recipe_of("--testbed_split", "forget10_0"))
    with pytest.raises(RecipeError) as caught:
        parse_recipe(["--method", "ga", "--testbed_seed", "1", "--testbed_split", "forget10_0"])
    said = "\n".join(caught.value.faults)
    assert "`testbed_seed` is 1, but no `testbed` is set" in said
    assert "`testbed_split` is forget10_0, but no `testbed` is set" in said


def test_a_run_measures_both_drawings_and_probes_one(recipe_of):
    results = run(recipe_of("--probes", "entities@validation", "--probe_steps", "2", "--testbed_split", "forget25_1"))
    assert list(results["after"].tasks) == ["entities@validation", "entities@report"]
    metrics = results["after"].tasks["entities@report"].metrics
    assert {"forget_vqa", "forget_qa", "retain_vqa", "retain_qa", "real_vqa", "real_qa"} <= metrics.keys()
    assert metrics["forget_vqa"].n == 2 * 5 * 2 * 4, "two people, five facts, two wordings, four drawings"
