"""Shared fixtures: where the open data sets lie, tiny models built offline."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder with the open data sets (StereoSet, PAIRS, WikiText-2, ...)."""
    folder = Path(os.environ.get("BIASUNLEARN_DATA", SHARED / "data"))
    if not folder.is_dir():
        pytest.skip(f"no open data sets at {folder}; set BIASUNLEARN_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session")
def stories_model() -> Path:
    """A real pretrained language model of 260,032 parameters."""
    folder = Path(os.environ.get("BIASUNLEARN_DATA", SHARED / "data")).parent / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip(f"no stories260K model at {folder}; set BIASUNLEARN_DATA to the `data` folder beside `models`")
    return folder
