"""The card: its numbers are those of results.json, its words those that a stranger needs."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from biasunlearn_trainer.eval.findings import number
from biasunlearn_trainer.hub.card import write_card
from biasunlearn_trainer.hub.finished import FinishedRun, read_run, weight_digests
from biasunlearn_trainer.hub.licences import benchmark_of, sources_of
from biasunlearn_trainer.hub.methods import METHODS as PUBLIC
from biasunlearn_trainer.hub.naming import is_hub_id, portable, public_name
from biasunlearn_trainer.trainers.registry import METHODS


def entry(value, n, low, high, ideal=1.0):
    return {"value": value, "n": n, "ci95": [low, high], "higher_is_better": True, "ideal": ideal}


def results(after=0.8125, ss=53.125):
    def state(ambiguous, ss, model):
        metrics = {"ambiguous": ambiguous, "facts": entry(0.9375, 64, 0.85, 0.9765)}
        bias = {"ss": {**entry(ss, 640, ss - 3.75, ss + 3.75, 50.0), "higher_is_better": None}}
        groups = {"age": bias, "gender": bias}
        tasks = {"planted@report": {"metrics": metrics, "groups": {}}, "stereoset": {"metrics": bias, "groups": groups}}
        return {"schema_version": 1, "model": model, "tasks": tasks}

    return {
        "before": state(entry(0.0625, 80, 0.02, 0.14), 88.75, "/somewhere/model"),
        "after": state(entry(after, 80, 0.71, 0.88), ss, "/somewhere/out"),
    }


@pytest.fixture
def card_of(finished):
    """`card_of(results)`: the card of a finished run with these results."""

    def card(found, **options):
        folder = finished()
        (folder / "results.json").write_text(json.dumps(found))
        return write_card(read_run(folder), "me/mine", **options)

    return card


def numbers_of(found):
    """Every number of a results.json, written with the digits of either scale."""
    if isinstance(found, dict):
        return set().union(*(numbers_of(part) for part in found.values()))
    if isinstance(found, list):
        return set().union(*(numbers_of(part) for part in found))
    if isinstance(found, bool) or not isinstance(found, int | float):
        return set()
    return {number(found, 1.0), number(found, 100.0), str(found)}


def test_every_number_of_the_tables_stands_in_results_json(card_of):
    found = results()
    section = card_of(found).text.split("## Results")[1].split("\n- `")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ") and "---" not in line]
    shown = [part for row in rows for part in re.findall(r"-?\d+(?:\.\d+)?", row)]
    assert len(shown) > 30
    assert set(shown) <= numbers_of(found), set(shown) - numbers_of(found)
    assert "0.06 [0.02, 0.14] | 0.81 [0.71, 0.88]" in section and "| 80 |" in section
    assert "88.8 [85.0, 92.5] | 53.1 [49.4, 56.9]" in section
    assert section.count("`ss`") == 3  # overall, and by group


def test_other_results_make_another_card(card_of):
    first, second = card_of(results()).content, card_of(results(after=0.1875)).content
    assert "0.81 [0.71, 0.88]" in first and "0.81 [" not in second
    assert "0.19 [0.71, 0.88]" in second


def test_the_model_index_holds_every_value_with_n_interval_and_the_value_before(card_of):
    found = results()
    data = ModelCard(str(card_of(found))).data
    assert data.library_name == "peft" and data.pipeline_tag == "text-generation"
    assert {"biasunlearn_trainer", "machine-unlearning", "npo", "lora"} <= set(data.tags)
    [index] = data.to_dict()["model-index"]
    listed = {
        (result["dataset"]["type"], metric["type"]): metric
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert set(listed) == {("planted@report", "ambiguous"), ("planted@report", "facts"), ("stereoset", "ss")}
    ambiguous = listed["planted@report", "ambiguous"]
    assert ambiguous["value"] == 0.8125
    assert ambiguous["args"] == {
        "n": 80,
        "ci95": [0.71, 0.88],
        "ideal": 1.0,
        "before": {"value": 0.0625, "n": 80, "ci95": [0.02, 0.14]},
    }


def test_a_stranger_reads_what_was_done_with_what_and_what_for(card_of, tiny_llama):
    text = card_of(results(), license="apache-2.0").content
    for words in (
        "# mine",
        "A LoRA adapter for",
        f"`{tiny_llama.name}`, a model on the trainer's own disk and not on the Hub",
        "arXiv 2404.05868",
        "eq. 3",
        "log sigmoid(-beta",
        "`lora_r: 4`",
        "training, forget | `forget.jsonl` | 6 | not stated",
        "[StereoSet (Nadeem, Bethke and Reddy 2021)](https://github.com/moinnadeem/StereoSet)",
        "CC BY-SA 4.0",
        "## Intended use and limits",
        "Not for",
        'PeftModel.from_pretrained(base, "me/mine")',
        "peft ",
        "license: apache-2.0",
    ):
        assert words in text, words
    assert str(tiny_llama) not in text and "base_model:" not in text
    assert "In short: the bias is" in text


def test_a_base_on_the_hub_is_named_and_loaded_by_its_id(card_of):
    text = card_of(results(), base_model="org/base-7b").content
    assert "base_model: org/base-7b" in text and "base_model_relation: adapter" in text
    assert 'from_pretrained("org/base-7b"' in text and "https://huggingface.co/org/base-7b" in text


def test_without_results_the_card_says_so_and_has_no_number(finished):
    folder = finished()
    (folder / "results.json").unlink()
    card = write_card(read_run(folder, needs_results=False), "me/mine")
    assert "**Nothing was measured.**" in card.text and "## Results" not in card.text
    assert "model-index" not in card.content


def test_a_quantised_base_is_said_to_be_one(finished):
    run = read_run(finished())
    quantised = FinishedRun(run.folder, run.results, {**run.recipe, "load_in_4bit": True}, "", run.environment)
    assert "measured on a quantised base" in write_card(quantised, "me/mine").text
    assert "merged into the dequantised weights" in write_card(quantised, "me/mine", kind="merged").text


def test_every_method_has_its_public_words_and_they_agree_with_the_docs():
    from pathlib import Path

    docs = Path(__file__).resolve().parents[2] / "docs"
    assert set(PUBLIC) == set(METHODS)
    papers = (docs / "papers.md").read_text()
    for name, method in PUBLIC.items():
        page = (docs / f"{method.page}.md").read_text()
        assert method.arxiv in papers, name
        assert "**Equation**" in page, name


def test_sets_are_named_with_their_licences(tmp_path):
    assert sources_of("anything", "llava") == [{"title": "made up by biasunlearn_trainer", "licence": "Apache-2.0"}]
    assert [s["licence"] for s in sources_of("anything", "stereoset")] == ["CC BY-SA 4.0", "CC BY-SA 3.0"]
    source = {"title": "BBQ", "licence": "CC BY 4.0", "url": "https://x", "num_rows": 3}
    (tmp_path / "build.json").write_text(json.dumps({"sources": [source]}))
    assert sources_of(str(tmp_path)) == [{"title": "BBQ", "licence": "CC BY 4.0", "url": "https://x"}]
    (tmp_path / "build.json").unlink()
    (tmp_path / "README.md").write_text("---\nlicense: mit\npretty_name: Mine\n---\n# Mine\n")
    assert sources_of(str(tmp_path)) == [{"title": "Mine", "licence": "mit"}]
    assert sources_of(str(tmp_path / "rows.jsonl")) == []
    assert benchmark_of("stereoset@report")[1] == "CC BY-SA 4.0" and benchmark_of("bbq_letters")[0].startswith("BBQ")
    assert benchmark_of("sb_bench_sum@x")[1].startswith("CC BY-NC-SA") and benchmark_of("multiple_choice") is None


@pytest.mark.parametrize(
    ("value", "public"),
    [
        ("/home/me/models/llama", "llama"),
        ("planted@train=/home/me/a b/rows", "planted@train=rows"),
        ("~/rows.jsonl", "rows.jsonl"),
        ("C:\\Users\\me\\rows.jsonl", "rows.jsonl"),
        ("as seen in /home/me/x.yaml, then", "as seen in x.yaml, then"),
        ("org/model", "org/model"),
        ("https://huggingface.co/org/model", "https://huggingface.co/org/model"),
        ("beta/|y| and 1/2", "beta/|y| and 1/2"),
        ("key hf_abcdefghijklmnopqrstuvwxyz", "key (a token was here)"),
        (["/a/b", 3, None], ["b", 3, None]),
    ],
)
def test_what_is_public_names_no_place(value, public):
    assert portable(value) == public


def test_hub_ids_are_told_from_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "run").mkdir(parents=True)
    assert is_hub_id("org/model") and is_hub_id("org/set/config")
    assert not any(map(is_hub_id, ("outputs/run", "data/rows.jsonl", "/a/b", "./a/b", "../a", "model", "", None)))
    assert public_name("outputs/run") == "run"


def test_a_run_notes_which_weights_its_results_are_of(finished):
    folder = finished()
    noted = json.loads((folder / "environment.json").read_text())["measured"]
    assert noted == weight_digests(folder) and set(noted) == {"adapter_model.safetensors"}
    assert yaml.safe_load((folder / "recipe.resolved.yaml").read_text())["method"] == "npo"
