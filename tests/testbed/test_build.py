"""Building: the folder's layout, the cache, and, slowly, how good the planted models are."""

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
from datasets import load_dataset

from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.testbed import RECIPES, Testbed, WorldRecipe, build, describe
from biasunlearn_trainer.testbed.__main__ import main
from biasunlearn_trainer.testbed.cache import build_once
from biasunlearn_trainer.testbed.recipe import LanguageModelSize

TINY = WorldRecipe(
    num_scene_rows=120,
    num_forget=8,
    num_retain=12,
    num_eval=3,
    steps=2,
    scene_batch=4,
    fact_batch=2,
    language_model=LanguageModelSize(hidden_size=32, intermediate_size=48, num_layers=1),
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def testbed(cache):
    return build("llava", cache_dir=cache, recipe=TINY)


def rows_of(folder):
    return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")


def test_a_testbed_is_models_sets_and_a_task(testbed):
    assert type(load_model(testbed.model_path)).__name__ == "LlavaForConditionalGeneration"
    assert type(load_processor(testbed.oracle_path)).__name__ == "LlavaProcessor"
    forget, preferred, retain = (rows_of(testbed.datasets[name]) for name in ("forget", "preferred", "retain"))
    assert len(forget) == len(preferred) == 8 and forget["pair_id"] == preferred["pair_id"]
    assert forget[0]["images"][0].size == (32, 32)
    assert {len(images) for images in retain["images"]} == {0, 1}
    (task,) = testbed.tasks
    report = rows_of(task.removeprefix("planted="))
    assert set(report["kind"]) == {
        "ambiguous",
        "t_generality",
        "v_generality",
        "disambiguated",
        "perception",
        "facts",
    }
    for row in report:
        assert (row["rejected"] is None) == (row["kind"] in ("disambiguated", "perception", "facts"))


def test_rows_carry_the_neutral_schema(testbed):
    columns = ["prompt", "completion", "bias_type", "polarity", "pair_id", "source", "source_id", "images"]
    for folder in testbed.datasets.values():
        assert rows_of(folder).column_names == columns


def test_the_manifest_says_what_was_built(testbed):
    manifest = testbed.manifest
    assert manifest["recipe"]["num_forget"] == 8 and manifest["recipe"]["language_model"]["hidden_size"] == 32
    assert {"torch", "transformers", "datasets", "python"} <= manifest["versions"].keys()
    assert manifest["num_rows"] == {
        "forget": 8,
        "preferred": 8,
        "retain": manifest["num_rows"]["retain"],
        "report": 125,
    }
    assert set(manifest["figures"]) == {"planted", "oracle"}
    assert all(0 <= value <= 1 for figures in manifest["figures"].values() for value in figures.values())
    assert any(line.startswith("planted") and "ambiguous" in line for line in describe(testbed))


def test_equal_recipes_build_equal_testbeds(testbed, tmp_path):
    again = build("llava", cache_dir=tmp_path, recipe=replace(TINY))
    assert again.model_path != testbed.model_path
    for which in ("model_path", "oracle_path"):
        first, second = (load_model(getattr(t, which)).state_dict() for t in (testbed, again))
        assert all(first[name].equal(second[name]) for name in first)
    for name in testbed.datasets:
        assert rows_of(testbed.datasets[name]).to_list() == rows_of(again.datasets[name]).to_list()


def test_a_second_build_takes_the_first_from_the_cache(testbed, cache, monkeypatch):
    def refuse(*args):
        raise AssertionError("built again")

    monkeypatch.setattr("biasunlearn_trainer.testbed.planted_world.build_world", refuse)
    assert build("llava", cache_dir=cache, recipe=replace(TINY)) == testbed
    with pytest.raises(AssertionError, match="built again"):
        build("llava", cache_dir=cache, recipe=replace(TINY, steps=3))


def test_a_world_of_words_builds_without_pictures(tmp_path):
    testbed = build("llama", cache_dir=tmp_path, recipe=replace(TINY, name="llama"))
    assert type(load_model(testbed.model_path)).__name__ == "LlamaForCausalLM"
    report = rows_of(testbed.tasks[0].removeprefix("planted="))
    assert "images" not in report.column_names and "v_generality" not in report["kind"]


def test_the_cache_folder_can_be_chosen_by_the_environment(testbed, cache, monkeypatch):
    monkeypatch.setenv("BIASUNLEARN_CACHE", str(cache))
    assert build("llava", recipe=replace(TINY)) == testbed


def test_a_failed_build_leaves_no_entry_and_the_next_one_succeeds(tmp_path):
    def fail(target):
        (target / "model").mkdir()
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        build_once(tmp_path / "entry", fail)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    build_once(tmp_path / "entry", lambda target: (target / "testbed.json").write_text("{}"))
    assert (tmp_path / "entry" / "testbed.json").is_file()


def test_a_killed_build_leaves_no_entry(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from biasunlearn_trainer.testbed.cache import build_once
def fill(target):
    (target / "half").write_text("")
    os.kill(os.getpid(), signal.SIGKILL)
build_once(Path({str(tmp_path)!r}) / "entry", fill)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert not (tmp_path / "entry").exists() and (tmp_path / "entry.partial" / "half").exists()
    build_once(tmp_path / "entry", lambda target: (target / "testbed.json").write_text("{}"))
    assert [path.name for path in (tmp_path / "entry").iterdir()] == ["testbed.json"]
    assert not (tmp_path / "entry.partial").exists()


def test_two_processes_build_once(tmp_path):
    script = f"""
import sys, time
from pathlib import Path
from biasunlearn_trainer.testbed.cache import build_once
def fill(target):
    print("built")
    time.sleep(0.5)
    (target / "testbed.json").write_text("{{}}")
build_once(Path({str(tmp_path)!r}) / "entry", fill)
"""
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(printed).count("built") == 1


def test_unknown_names_and_foreign_recipes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'llava'"):
        build("lava", cache_dir=tmp_path)
    with pytest.raises(ValueError, match="testbed 'llama', not for 'llava'"):
        build("llava", cache_dir=tmp_path, recipe=RECIPES["llama"])


def test_the_command_prints_paths_and_draws_a_sheet(testbed, cache, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "llava", TINY)
    main(["llava", "--cache_dir", str(cache), "--contact_sheet", str(tmp_path / "sheet.png")])
    printed = capsys.readouterr().out
    assert testbed.model_path in printed and "disambiguated" in printed
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_testbed_can_be_moved(testbed, tmp_path):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "testbed.json").write_text(json.dumps(testbed.manifest))
    moved = Testbed.load(folder)
    assert moved.datasets["forget"] == str(folder / "forget") and moved.oracle_path is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava", "qwen2vl", "blip2", "minigpt4", "llama"])
def test_the_bias_is_planted_and_the_oracle_is_free_of_it(name):
    if name == "qwen2vl" and find_spec("torchvision") is None:
        pytest.skip("Qwen2-VL's processor needs torchvision: pip install -e '.[vision]' -c constraints.txt")
    figures = build(name).manifest["figures"]
    for kind in ("disambiguated", "perception", "facts"):
        assert figures["planted"][kind] >= 0.97, kind
        assert figures["oracle"][kind] >= 0.97, kind
    for kind in figures["planted"].keys() & {"ambiguous", "t_generality", "v_generality"}:
        assert figures["planted"][kind] <= 0.08, kind
        assert figures["oracle"][kind] >= 0.98, kind
