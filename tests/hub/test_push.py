"""Publishing by the Hub's real client, and loading in a process that has never heard of this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from biasunlearn_trainer.hub import PublishError, push
from biasunlearn_trainer.hub.__main__ import main
from biasunlearn_trainer.models import load_model, load_processor

STRANGER = Path(__file__).with_name("load_plain.py")
ADAPTER_FILES = {"adapter_config.json", "adapter_model.safetensors"}
BESIDE = {"README.md", "recipe.resolved.yaml", "results.json", "report.png", "tokenizer.json", "tokenizer_config.json"}


def logits_of(folder) -> torch.Tensor:
    model, tokenizer = load_model(str(folder)).eval(), load_processor(str(folder))
    with torch.no_grad():
        return model(**tokenizer("Who was late 3? The tall one.", return_tensors="pt")).logits


def a_stranger_loads(hub, folder, base, *repos) -> dict[str, torch.Tensor]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | hub.environment()
    environment |= {"HF_HOME": str(folder / "stranger"), "PYTHONPATH": ""}
    command = [sys.executable, STRANGER, folder / "logits.pt", base, *repos]
    done = subprocess.run(
        [str(word) for word in command], env=environment, cwd=folder, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "logits.pt", weights_only=True)


def test_what_is_published_answers_the_same_where_nobody_knows_this_package(finished, online, tiny_llama, tmp_path):
    adapter, whole = finished("adapter"), finished("model")
    push(adapter, "me/adapter")
    push(adapter, "me/merged", merged=True)
    push(whole, "me/whole")
    loaded = a_stranger_loads(online, tmp_path, tiny_llama, "me/adapter", "me/merged", "me/whole")
    assert torch.equal(loaded["me/adapter"], logits_of(adapter))
    assert torch.equal(loaded["me/whole"], logits_of(whole))
    assert torch.allclose(loaded["me/merged"], logits_of(adapter), atol=1e-5)
    before = logits_of(tiny_llama)
    assert not any(torch.allclose(after, before, atol=1e-3) for after in loaded.values()), "nothing was unlearned"
    for repo in ("me/merged", "me/whole"):
        files = set(online.files(repo))
        assert not ADAPTER_FILES & files and {"model.safetensors", "config.json", *BESIDE} <= files


def test_an_adapter_is_published_with_what_belongs_to_it_in_one_commit(finished, online, capsys):
    folder = finished()
    assert main(["push", str(folder), "me/mine", "--private"]) == 0
    files = online.files()
    assert set(files) - {".gitattributes", "chat_template.jinja"} == ADAPTER_FILES | BESIDE
    assert online.repos["me/mine"]["private"]
    assert len(online.commits) == 1
    assert files["adapter_model.safetensors"] == (folder / "adapter_model.safetensors").read_bytes()
    captured = capsys.readouterr()
    assert "/commit/" in captured.out and online.token not in captured.out + captured.err


def test_a_branch_is_made_and_main_stays_as_it_was(finished, online):
    push(finished(), "me/mine", revision="beta-0.1")
    assert set(online.files()) == {".gitattributes"}
    assert set(online.files(branch="beta-0.1")) >= ADAPTER_FILES
    assert {"branch": "beta-0.1"}.items() <= online.commits[0].items()


def test_nothing_of_this_machine_and_nothing_pickled_is_sent(finished, finished_runs, online, tiny_llama):
    folder = finished()
    assert (folder / "training_args.bin").is_file() and list(folder.glob("checkpoint-*"))
    push(folder, "me/mine")
    places = [str(folder), str(finished_runs), str(tiny_llama), str(Path.home()), os.getcwd(), online.token]
    for name, content in online.files().items():
        assert not [place for place in places if place.encode() in content], name
        assert not name.endswith((".bin", ".pt", ".pth", ".pkl")), name
    assert json.loads(online.files()["adapter_config.json"])["base_model_name_or_path"] is None
    recipe = yaml.safe_load(online.files()["recipe.resolved.yaml"])
    assert recipe["forget_dataset"] == "forget.jsonl" and recipe["tasks"] == ["planted=planted.jsonl"]
    assert recipe["model_name_or_path"] == tiny_llama.name and "output_dir" not in recipe
    results = json.loads(online.files()["results.json"])
    assert results["before"]["model"] == tiny_llama.name and results["after"]["model"] == "this model"
    mine = json.loads((folder / "results.json").read_text())
    assert [results[s]["tasks"] for s in results] == [mine[s]["tasks"] for s in mine]


def test_a_later_push_replaces_an_adapter_by_the_merged_model(finished, online):
    folder = finished()
    push(folder, "me/mine")
    push(folder, "me/mine", merged=True)
    assert set(online.commits[1]["deleted"]) == ADAPTER_FILES
    assert "model.safetensors" in online.files() and not ADAPTER_FILES & set(online.files())


def test_a_dry_run_writes_what_would_be_sent_and_asks_nobody(finished, online, tmp_path, capsys, monkeypatch):
    folder = finished()
    assert main(["push", str(folder), "me/mine", "--dry_run", str(tmp_path / "there")]) == 0
    assert online.requests == [] and "nothing was sent" in capsys.readouterr().out
    push(folder, "me/mine")
    written = {path.name: path.read_bytes() for path in (tmp_path / "there").iterdir()}
    assert written == {name: content for name, content in online.files().items() if name != ".gitattributes"}
    assert main(["push", str(folder), "me/mine", "--dry_run", str(tmp_path / "there")]) == 2
    assert "is not empty" in capsys.readouterr().err


def refused(words, capsys) -> tuple[int, str]:
    status = main(["push", *map(str, words)])
    return status, capsys.readouterr().err


@pytest.mark.parametrize(
    ("route", "status", "words"),
    [
        ("create", 409, ("taken",)),
        ("create", 401, ("hf auth login",)),
        ("commit", 403, ("may not write", "write permission")),
        ("preupload", 404, ("no me/mine",)),
        ("commit", 409, ("taken, or was changed",)),
    ],
)
def test_what_the_hub_refuses_is_explained(route, status, words, finished, online, capsys):
    folder = finished()
    online.refusals[route] = status, f"no, and your token {online.token} neither"
    code, said = refused([folder, "me/mine"], capsys)
    assert code == 1
    for word in (*words, str(folder), "python -m biasunlearn_trainer.hub push"):
        assert word in said
    assert online.token not in said
    assert {path.name for path in folder.iterdir()} >= ADAPTER_FILES


def test_a_name_of_somebody_else_is_forbidden(finished, online, capsys):
    code, said = refused([finished(), "them/theirs", "--private", "--revision", "new"], capsys)
    assert code == 1
    assert "may not write to them/theirs" in said and "them/theirs --private --revision new" in said


def test_another_model_of_ones_own_is_not_replaced_unasked(finished, online, capsys):
    online.repos["me/mine"] = {"private": False, "branches": {"main": {"config.json": b"{}", "model.bin": b"x"}}}
    folder = finished()
    code, said = refused([folder, "me/mine"], capsys)
    assert code == 1 and "holds something else already (config.json, model.bin)" in said
    code, said = refused([folder, "me/mine", "--private"], capsys)
    assert code == 1 and "already and public" in said
    assert main(["push", str(folder), "me/mine", "--overwrite"]) == 0
    assert not {"config.json", "model.bin"} & set(online.files()), "they would be loaded beside the adapter"


@pytest.mark.parametrize("name", ["me/my/model", "me/-model", "me/mine.git", "me/mi..ne", "me/no spaces", "../up"])
def test_names_that_are_none(name, finished, online, capsys):
    code, said = refused([finished(), name], capsys)
    assert code == 1 and repr(name) in said and "OWNER/NAME" in said
    assert online.requests == []


def test_without_a_network_everything_stays_and_the_command_is_named(finished, online, capsys):
    folder = finished()
    online.http.shutdown()
    online.http.server_close()
    code, said = refused([folder, "me/mine"], capsys)
    assert code == 1
    for word in ("was not reached", str(folder), "To repeat it", f"hub push {folder} me/mine"):
        assert word in said


def test_an_offline_client_sends_nothing(finished, online, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, said = refused([finished(), "me/mine"], capsys)
    assert code == 1 and "HF_HUB_OFFLINE is set" in said


def test_without_a_token(finished, online, capsys, monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none either"))
    code, said = refused([finished(), "me/mine"], capsys)
    assert code == 1 and "hf auth login" in said and "HF_TOKEN" in said
    assert online.requests == []


def unfinished(folder):
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({"before": results["before"]}))


def other_base(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "gpt2"}))


def pickled(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({}, folder / "adapter_model.bin")


def other_weights(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda folder: (folder / "results.json").unlink(), "there is no results.json"),
        (unfinished, "no `after`: the run was broken off"),
        (lambda folder: (folder / "results.json").write_text("{"), "no JSON"),
        (other_base, "adapter is for another base: adapter_config.json names gpt2"),
        (pickled, "pickled (adapter_model.bin)"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "neither adapter_model.safetensors nor"),
        (other_weights, "not those that results.json was measured on"),
    ],
)
def test_what_is_no_finished_run_is_not_published(spoil, word, finished, online, capsys):
    folder = finished()
    spoil(folder)
    code, said = refused([folder, "me/mine"], capsys)
    assert code == 2 and word in said
    assert online.requests == []


def test_a_folder_that_is_not_there(tmp_path, online):
    with pytest.raises(PublishError, match="is no folder"):
        push(tmp_path / "nowhere", "me/mine")
