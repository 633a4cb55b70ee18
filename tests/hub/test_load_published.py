"""A published adapter loads by its Hub id as it does from its folder, and what is not there is said."""

import pytest
import torch
from huggingface_hub import constants

from biasunlearn_trainer.hub import push
from biasunlearn_trainer.models import load_config, load_model, load_processor

WORDS = "Who was late 3? The tall one."


def logits_of(name, revision=None):
    model, tokenizer = load_model(str(name), revision=revision), load_processor(str(name), revision=revision)
    assert any(value.requires_grad for value in model.parameters()), "unlearning may go on from it"
    with torch.no_grad():
        return model.eval()(**tokenizer(WORDS, return_tensors="pt")).logits


@pytest.fixture
def with_base(online, tiny_llama, tmp_path, monkeypatch):
    """The loopback server, with the base of the runs as me/base; what is downloaded goes to a cache of this test."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(  # made of the endpoint when huggingface_hub is imported
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", online.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    files = {path.name: path.read_bytes() for path in tiny_llama.iterdir() if path.is_file()}
    online.repos["me/base"] = {"private": False, "branches": {"main": files}}
    return online


def test_an_adapter_loads_by_its_id_and_offline_from_the_cache(finished, with_base, monkeypatch):
    folder = finished()
    push(folder, "me/mine", base_model="me/base")
    expected = logits_of(folder)
    assert torch.equal(logits_of("me/mine"), expected)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(with_base.requests)
    assert torch.equal(logits_of("me/mine"), expected)
    assert len(with_base.requests) == asked


def test_a_revision_is_the_adapters_and_not_its_bases(finished, with_base):
    folder = finished()
    push(folder, "me/mine", base_model="me/base", revision="later")
    assert torch.equal(logits_of("me/mine", revision="later"), logits_of(folder))
    with pytest.raises(ValueError, match="Unrecognized model in me/mine"):
        load_model("me/mine")  # on main there is nothing


def test_an_adapter_that_names_no_base(finished, with_base):
    push(finished(), "me/mine")  # trained on a model that lies on a disk
    with pytest.raises(OSError, match="names no base model"):
        load_config("me/mine")
    with pytest.raises(OSError, match="names no base model"):
        load_model("me/mine")


def test_an_adapter_that_is_pickled(finished, with_base):
    push(finished(), "me/mine", base_model="me/base")
    files = with_base.files("me/mine")
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    with pytest.raises(OSError, match=r"holds no adapter_model\.safetensors"):
        load_model("me/mine")


@pytest.mark.parametrize("is_offline", [False, True])
def test_what_is_nowhere_is_not_found(is_offline, with_base, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", is_offline)
    for load in (load_config, load_model, load_processor):
        with pytest.raises(OSError, match="'me/nothing' was not found"):
            load("me/nothing")
    assert bool(with_base.requests) != is_offline
