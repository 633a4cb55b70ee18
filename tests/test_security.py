"""What comes from others runs no code here, opens no file but its own, and no path leads out of a folder."""

import ast
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.data_builders.sources import plain
from biasunlearn_trainer.models import load_config, load_model
from biasunlearn_trainer.transfer import find_adapter

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path for folder in ("biasunlearn_trainer", "data_builders", "eval") for path in (ROOT / folder).rglob("*.py")
]
UNSAFE = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "joblib.load",
    "cloudpickle.load",
    "yaml.load",
    "yaml.load_all",
    "yaml.unsafe_load",
    "yaml.full_load",
    "marshal.loads",
    "os.system",
    "eval",
    "exec",
}


class Payload:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.fixture
def payload(tmp_path):
    """A pickle's bytes, and the folder that appears where they were read."""
    mark = tmp_path / "was_read"
    yield pickle.dumps({"state": Payload(mark)}), mark
    assert not mark.exists(), "the pickle was read"


def calls(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}, node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=[str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_file_reads_code(path):
    for name, words, line in calls(path):
        where = f"{path}:{line}: {name}"
        assert name not in UNSAFE, where
        assert words.get("trust_remote_code") != "True", where
        if name == "torch.load":
            assert words.get("weights_only") == "True", where
        if name in ("np.load", "numpy.load"):
            assert words.get("allow_pickle", "False") == "False", where
        is_model = name.endswith(".from_pretrained") and name.startswith("AutoModel")
        if is_model or name == "model_class(config).from_pretrained":
            assert words.get("use_safetensors") == "True", where


def test_trust_in_remote_code_is_off_unless_asked_for():
    from biasunlearn_trainer.hub.__main__ import build_parser
    from biasunlearn_trainer.recipe.config import RunConfig

    assert RunConfig().trust_remote_code is False
    assert build_parser().parse_args(["push", "a", "b"]).trust_remote_code is False


def test_pickled_weights_are_not_read(tmp_path, tiny_llama, payload):
    content, _ = payload
    for file in tiny_llama.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(OSError, match="safetensors"):
        load_model(str(tmp_path))


def test_pickled_adapters_are_not_read(tmp_path, tiny_llama, payload):
    content, _ = payload
    (tmp_path / "adapter_model.bin").write_bytes(content)
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_llama), "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for load in (load_model, find_adapter):
        with pytest.raises(OSError, match="read from safetensors only"):
            load(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    (tmp_path / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\nclass Config: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for load in (load_config, load_model):
        with pytest.raises((ValueError, OSError)):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_runs_own_states_are_read_as_tensors_only(tmp_path, tiny_llama, text_rows, payload):
    """Optimizer, scheduler and random states of a checkpoint, as transformers reads them."""
    from biasunlearn_trainer import GAConfig, GATrainer

    args = GAConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = GATrainer(str(tiny_llama), args, forget_dataset=text_rows(2))
    trainer.create_optimizer_and_scheduler(1)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    content, _ = payload
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(content)
    for read in (trainer._load_optimizer_and_scheduler, trainer._load_rng_state):
        with pytest.raises(pickle.UnpicklingError):
            read(str(folder))


@pytest.mark.parametrize(
    "image", ["../../etc/passwd", "a/../../secret.png", "https://example.org/a.png", "../rows.png"]
)
def test_a_row_names_no_picture_outside_its_sets_folder(image, tmp_path):
    folder = tmp_path / "set" / "inner"
    folder.mkdir(parents=True)
    row = {"prompt": "Who?", "completion": " She.", "images": [image]}
    (folder / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InvalidDataset, match=r"outside the data file's folder|is a URL"):
        plain.load_rows(folder / "rows.jsonl")


@pytest.mark.parametrize("stored", [lambda p: [p], lambda p: p, lambda p: [{"path": p, "bytes": None}]])
@pytest.mark.parametrize("place", ["/etc/passwd", "https://example.org/a.png", "../../secret.png"])
def test_a_set_from_the_hub_names_no_file_of_this_machine(stored, place, monkeypatch):
    rows = [{"prompt": "Who?", "completion": " She.", "images": stored(place)}]
    monkeypatch.setattr(plain, "load_dataset", lambda *_, **__: Dataset.from_list(rows))
    with pytest.raises(InvalidDataset, match="which a set from the Hub may not"):
        plain.load_rows("them/theirs")


def test_a_set_from_the_hub_that_brings_its_pictures(monkeypatch):
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    picture = {"path": "a.png", "bytes": buffer.getvalue()}
    rows = [{"prompt": "Who?", "completion": " She.", "images": [picture]}]
    monkeypatch.setattr(plain, "load_dataset", lambda *_, **__: Dataset.from_list(rows))
    assert plain.load_rows("them/theirs")[0]["images"][0].size == (8, 8)


def test_a_repository_with_names_that_lead_out_of_its_folder(hub, tmp_path, monkeypatch):
    """What the Hub's client does with them, and that ours asks for the adapter's two files alone."""
    from huggingface_hub import constants, snapshot_download

    hub.repos["them/theirs"] = {"private": False, "branches": {"main": {"adapter_config.json": b"{}"}}}
    hub.extra_siblings = ["../../../evil.txt"]
    hub.repos["them/theirs"]["branches"]["main"]["../../../evil.txt"] = b"evil"
    cache = tmp_path / "a" / "b" / "c" / "d"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(Exception) as caught:
        snapshot_download("them/theirs", endpoint=hub.url, cache_dir=cache)
    assert "evil.txt" in str(caught.value) or isinstance(caught.value, ValueError), caught.value
    assert not list(tmp_path.rglob("evil.txt"))


def test_an_index_that_leads_out_of_its_folder(tmp_path, tiny_llama):
    from biasunlearn_trainer.saliency.changes import changes_of

    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="leads out of its folder"):
        changes_of(str(tmp_path), str(tiny_llama))


def test_torch_reads_no_code_from_the_payload(payload, tmp_path):
    """The payload does what it says where a reader is careless; else the tests above could not fail."""
    content, mark = payload
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pt", weights_only=True)
    pickle.loads(content)
    assert mark.is_dir()
    mark.rmdir()
