"""StereoSet, CrowS-Pairs, BBQ and PAIRS by their recipes: counts as published, sets that train and are evaluated."""

import importlib.util
import json
from pathlib import Path

import pytest

from biasunlearn_trainer.data_builders.build import build
from biasunlearn_trainer.data_builders.build_recipe import read_build_recipe
from biasunlearn_trainer.data_builders.sources.plain import load_rows

ROOT = Path(__file__).resolve().parents[2]


def _load_server():
    spec = importlib.util.spec_from_file_location("chat_server_of_builds", Path(__file__).with_name("chat_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat = _load_server()
# Rows read: StereoSet 2,123 + 2,106 items x 3 sentences, CrowS-Pairs 1,508 pairs x 2, PAIRS 200 pictures x 3 answers
# (SOURCE.md of each); BBQ's six category files have 11,956 questions, half of them ambiguous, with two answers.
NUM_READ = {"stereoset": 3 * (2123 + 2106), "crows_pairs": 2 * 1508, "pairs": 3 * 200, "bbq": 11956 + 11956 // 2}


@pytest.fixture(scope="module")
def built_set(data_dir, tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("BIASUNLEARN_DATA", str(data_dir))
                recipe = read_build_recipe(ROOT / "recipes/data" / f"{name}.yaml", ["--output_dir", str(folder)])
            made[name] = folder, build(recipe, show_progress=False)
        return made[name]

    return make


def test_stereoset_is_read_whole_and_split_by_target(built_set):
    folder, report = built_set("stereoset")
    assert report.sources[0]["num_rows"] == NUM_READ["stereoset"]
    assert sum(split.num_rows for split in report.splits.values()) == NUM_READ["stereoset"]
    forget, retain, held_out = (load_rows(folder / f"data/{n}.parquet") for n in ("forget", "retain", "report"))
    assert forget["pair_id"] == retain["pair_id"]
    assert not set(forget["target"]) & set(held_out["target"])
    items = json.loads((folder / "data/report.json").read_text())["data"]
    assert 3 * sum(map(len, items.values())) == len(held_out)


@pytest.mark.parametrize(
    ("name", "num_rows"),
    [
        ("crows_pairs", {"forget": 904, "retain": 904, "report": 604}),
        ("pairs", {"forget": 100, "preferred": 100, "retain": 52, "report": 48}),
        ("bbq", {"forget": 2912, "preferred": 2912, "retain": 2872, "report": 3260}),
    ],
)
def test_the_others_are_read_whole(built_set, name, num_rows):
    folder, report = built_set(name)
    assert report.sources[0]["num_rows"] == NUM_READ[name]
    assert {split: r.num_rows for split, r in report.splits.items()} == num_rows
    assert not any(report.leaks.values())
    assert (folder / "contact_sheet.png").is_file() == (name == "pairs")
    rejected = load_rows(folder / "data/report.parquet", check_images=False)
    assert all(row != answer for row, answer in zip(rejected["rejected"], rejected["completion"], strict=True))


def test_stereosets_stereotypes_and_their_counterfactuals(built_set):
    folder, report = built_set("stereoset_counterfactual")
    assert report.sources[0]["num_rows"] == 3 * 2106
    forget, retain, held_out = (load_rows(folder / f"data/{n}.parquet") for n in ("forget", "retain", "report"))
    # The retained sentence is the one that is forgotten, with the other group in it.
    forgotten = {row["pair_id"]: row for row in forget}
    pairs = [(forgotten[row["pair_id"]], row) for row in retain if row["pair_id"] in forgotten]
    assert len(pairs) > 0.95 * len(forget)
    assert all(one["completion"] == other["rejected"] != other["completion"] for one, other in pairs)
    assert {(one["demographic"], other["demographic"]) for one, other in pairs} >= {
        ("female", "male"),
        ("male", "female"),
    }
    assert report.leaks == {"forget and report": 0, "retain and report": 1}
    assert report.rejects["splits"]["near duplicate"] > 0
    assert not set(forget["part_group"]) & set(held_out["part_group"])
    assert len(held_out) + len(forget) > 300
    assert sum(report.rejects["counterfactual"].values()) == 3 * 2106 - report.stages[0]["rows_out"] // 2


OWN_SENTENCES = (
    "Women are bad at parking.",
    "My aunt always loses her keys.",
    "The girl was too shy to speak.",
    "Mary forgot her own birthday.",
    "He never listens to his wife.",
    "That boy breaks every toy.",
    "The actress cried on the stage.",
    "A man does not cook.",
    "Her mother drives badly.",
    "The waitress mixed up the orders.",
)


@pytest.mark.parametrize("rephrased", [False, True])
def test_ones_own_sentences(tmp_path, monkeypatch, rephrased):
    rows = [{"prompt": "", "completion": text, "bias_type": "gender", "kind": "ambiguous"} for text in OWN_SENTENCES]
    (tmp_path / "my_sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (ROOT / "recipes/data/my_sentences.yaml").read_text()
    if rephrased:
        pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[test]' -c constraints.txt")
        # The stage that the recipe shows, put where it says.
        shown = [
            line[1:] for line in text.splitlines() if line.startswith("#     - stage") or line.startswith("#       ")
        ]
        text = text.replace("parts:", "\n".join(line[3:] for line in shown) + "\nparts:")
    (tmp_path / "r.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with chat.ChatServer() as server:
        words = ["--stages.1.base_url", server.url] if rephrased else []
        report = build(read_build_recipe("r.yaml", words), show_progress=False)
    num = len(OWN_SENTENCES) * (2 if rephrased else 1)
    sizes = {name: split.num_rows for name, split in report.splits.items()}
    assert sizes == {"forget": num * 7 // 10, "retain": num * 7 // 10, "report": num * 3 // 10}
    retain = load_rows("data/my_sentences/data/retain.parquet")
    assert set(retain["demographic"]) == {"male", "female"}
    if rephrased:
        assert sum(text.startswith("So tell:") for text in retain["completion"]) == len(retain) // 2


def test_pictures_are_in_the_set_and_no_path_of_this_machine(built_set, data_dir):
    folder, _ = built_set("pairs")
    picture = load_rows(folder / "data/forget.parquet")[0]["images"][0]
    assert picture.size[0] > 100
    assert str(data_dir).encode() not in (folder / "data/forget.parquet").read_bytes()


def run_recipe(tmp_path, model, folder, task):
    from biasunlearn_trainer.runner.run import main

    out = tmp_path / "run"
    words = ["--method", "npo", "--retain_loss", "nll", "--model_name_or_path", str(model), "--use_cpu", "true"]
    words += ["--forget_dataset", str(folder / "data/forget.parquet")]
    words += ["--retain_dataset", str(folder / "data/retain.parquet"), "--output_dir", str(out), "--max_steps", "2"]
    words += ["--per_device_train_batch_size", "2", "--save_strategy", "no", "--tasks", task, "--append_eos", "false"]
    words += ["--report_to", "none"]
    assert main(words) == 0
    return json.loads((out / "results.json").read_text())


@pytest.mark.slow
def test_stereoset_trains_and_is_evaluated(built_set, tmp_path, tiny_llama):
    folder, _ = built_set("stereoset")
    results = run_recipe(tmp_path, tiny_llama, folder, f"stereoset@report={folder / 'data/report.json'}")
    assert "stereoset@report" in json.dumps(results)


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("crows_pairs", "tiny_llama"),
        pytest.param("stereoset_counterfactual", "tiny_llama", marks=pytest.mark.slow),
        pytest.param("bbq", "tiny_llama", marks=pytest.mark.slow),
        pytest.param("pairs", "tiny_llava", marks=pytest.mark.slow),
    ],
)
def test_the_others_train_and_are_evaluated(data_dir, tmp_path, request, monkeypatch, name, model):
    monkeypatch.setenv("BIASUNLEARN_DATA", str(data_dir))
    limits = [word for split in ("forget", "retain", "report") for word in (f"--splits.{split}.limit", "12")]
    words = ["--output_dir", str(tmp_path / "set"), *limits]
    build(read_build_recipe(ROOT / "recipes/data" / f"{name}.yaml", words), show_progress=False)
    task = f"planted@report={tmp_path / 'set/data/report.parquet'}"
    results = run_recipe(tmp_path, request.getfixturevalue(model), tmp_path / "set", task)
    assert "reliability" in json.dumps(results)
