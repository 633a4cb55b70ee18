"""The pages name real things: functions, files, recipes, tests and pages that exist."""

import re
from pathlib import Path

import pytest

from biasunlearn_trainer import losses
from biasunlearn_trainer.trainers.registry import METHODS, get_method

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_names_a_recipe_its_function_and_every_section(page):
    text = page.read_text(encoding="utf-8")
    recipes = re.findall(r"recipes/\w+\.yaml", text)
    assert recipes, "no recipe"
    for path in recipes + re.findall(r"`((?:tests|biasunlearn_trainer)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    functions = re.findall(r"`(\w+_loss|token_kl)`", text)
    assert functions, "no function"
    assert set(functions) - {"retain_loss"} <= set(losses.__all__)
    for section in ("**Data.**", "**Equation**", "| option | default |", "| `loss/forget` |", "**Traps**"):
        assert section in text, section


def test_the_table_of_papers_names_what_exists():
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    for page in re.findall(r"\]\((methods/\w+\.md)", text):
        assert (ROOT / "docs" / page).is_file(), page
    for recipe in re.findall(r"`((?:planted_)?llava_\w+|demo)`", text):
        assert (ROOT / "recipes" / f"{recipe}.yaml").is_file(), recipe
    for file, names in re.findall(r"`(\w+\.py): ([\w, ]+)`", text):
        for name in names.split(", "):
            assert getattr(losses, name).__module__ == f"{losses.__name__}.{file.removesuffix('.py')}"


def test_every_page_is_in_the_table_of_papers():
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert {page.stem for page in PAGES} == set(re.findall(r"\]\(methods/(\w+)\.md\)", text))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_options_and_defaults_of_a_page_are_those_of_the_config(page, tmp_path):
    text = page.read_text(encoding="utf-8")
    config = get_method(page.stem)[1](output_dir=str(tmp_path))
    assert f"`{type(config).__name__}`" in text
    table = text.split("| option | default |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]+) \| ([^|]+) \|", table, flags=re.MULTILINE)
    assert rows
    for names, defaults in rows:
        for name, default in zip(names.split(", "), defaults.split(", "), strict=True):
            assert str(getattr(config, name.strip("`"))).lower() == default.strip("`"), name


def test_every_method_has_a_page():
    assert {page.stem for page in PAGES} >= {module for module, _ in METHODS.values()}
