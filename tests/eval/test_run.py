import json
import subprocess
import sys

import pytest

from biasunlearn_trainer.data_builders.sources.stereoset import StereoSetItem, write_json
from biasunlearn_trainer.eval.run import items_path, load_items, main, save_items
from biasunlearn_trainer.eval.schema import load_results


@pytest.fixture
def data(tmp_path):
    words = ("kind", "cruel", "green", "tall")
    items = [
        StereoSetItem(
            f"i{n}", word, "profession", "intrasentence", "He is BLANK.", f"{word} {n}.", f"no {word}.", "Rain."
        )
        for n, word in enumerate(words)
    ]
    write_json(items, tmp_path / "items.json")
    return tmp_path / "items.json"


def test_results_records_and_table(data, tiny_llama, tmp_path, capsys):
    output = tmp_path / "out" / "results.json"
    code = main(["--model", str(tiny_llama), "--tasks", f"stereoset@x={data}", "--output", str(output), "--limit", "3"])
    assert code == 0
    result = load_results(output)
    assert result.model == str(tiny_llama)
    assert list(result.tasks["stereoset@x"].metrics) == ["ss", "lms", "icat"]
    assert all(metric.n == 3 for metric in result.tasks["stereoset@x"].metrics.values())
    assert set(json.loads(output.read_text())) == {"schema_version", "model", "tasks"}
    assert len(load_items(items_path(output))["stereoset@x"]) == 3
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["task", "group", "metric", "value", "95", "%", "interval", "n"]
    assert printed[1].split()[:2] == ["stereoset@x", "ss"]
    assert str(output) in printed[-1]


def test_default_data_and_baseline(data, tiny_llama, tmp_path):
    first, second = tmp_path / "before.json", tmp_path / "after.json"
    command = ["--model", str(tiny_llama), "--tasks", "stereoset", "--data", str(data)]
    assert main([*command, "--output", str(first)]) == 0
    assert main([*command, "--output", str(second), "--baseline", str(items_path(first)), "--batch_size", "1"]) == 0
    assert load_results(first).to_dict() == load_results(second).to_dict()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--tasks": "stereset"}, "Did you mean 'stereoset'?"),
        ({"--data": "no/such/folder"}, "there is nothing at no/such/folder"),
        ({"--data": None}, "has no data"),
        ({"--output": "results.txt"}, "--output must be a .json file"),
        ({"--batch_size": "0"}, "--batch_size must be at least 1"),
        ({"--limit": "0"}, "limit must be at least 1"),
        ({"--model": "no/such-model"}, "no folder with a config.json, it is not in the local cache"),
        ({"--baseline": "gone.jsonl"}, "gone.jsonl"),
    ],
)
def test_errors_say_what_to_do(data, tiny_llama, tmp_path, capsys, changes, expected):
    options = {"--model": str(tiny_llama), "--tasks": "stereoset", "--data": str(data)}
    options |= {"--output": str(tmp_path / "results.json"), **changes}
    assert main([word for name, value in options.items() if value is not None for word in (name, value)]) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()


def test_records_survive_the_file(tmp_path):
    items = {"a": [{"index": 0, "answer": "größer", "logp": -1.25}], "b@c": [{"index": 0}, {"index": 1}]}
    save_items(items, tmp_path / "x.items.jsonl")
    assert load_items(tmp_path / "x.items.jsonl") == items
    (tmp_path / "broken.jsonl").write_text('{"task": "a"}\n{"index"')
    with pytest.raises(ValueError, match="line 2 is no record"):
        load_items(tmp_path / "broken.jsonl")


def test_module_runs_outside_the_repository(tmp_path):
    command = [sys.executable, "-m", "biasunlearn_trainer.eval.run", "--help"]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "--baseline" in printed and "stereoset" in printed
