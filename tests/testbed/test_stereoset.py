"""StereoSet trained into a small model: what is read, split and written, on a stand-in for the data."""

import gzip
import hashlib

import pytest
from datasets import load_dataset

from biasunlearn_trainer.data_builders.sources.stereoset import read_stereoset
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.testbed import StereoSetRecipe, build
from biasunlearn_trainer.testbed.planted_stereoset import ITEMS_FILE, TEXT_FILE, read_passages
from biasunlearn_trainer.testbed.recipe import LanguageModelSize

TINY = StereoSetRecipe(
    steps=2,
    item_batch=8,
    text_batch=2,
    vocab_size=400,
    language_model=LanguageModelSize(hidden_size=32, intermediate_size=48, num_layers=1, max_positions=64),
)
TERMS = [f"baker{i}" for i in range(20)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / ITEMS_FILE).parent.mkdir()
    (folder / TEXT_FILE).parent.mkdir()
    lines = ["prompt,choices,bias_type,target"]
    lines += [f"The {term} is BLANK.,['early' 'late' 'square'],profession,{term}" for term in TERMS]
    (folder / ITEMS_FILE).write_text("\n".join(lines) + "\n")
    with gzip.open(folder / TEXT_FILE, "wt") as file:
        file.write(
            " = Heading = \n" + "\n".join(f"The {i} th bridge was built across a wide river ." for i in range(9))
        )
    return folder


@pytest.fixture(scope="module")
def testbed(data, tmp_path_factory):
    return build("stereoset", cache_dir=tmp_path_factory.mktemp("cache"), data_dir=data, recipe=TINY)


def rows_of(folder):
    return load_dataset("parquet", data_files=f"{folder}/*.parquet", split="train")


def test_splits_share_no_target_term_and_lose_no_item(testbed):
    parts = {task.split("=")[0]: read_stereoset(task.split("=", 1)[1]) for task in testbed.tasks}
    assert list(parts) == ["stereoset@train", "stereoset@probe", "stereoset@report"]
    train, probe, report = ({item.target for item in part} for part in parts.values())
    assert len(train) == 10 and train | probe | report == set(TERMS)
    assert len(train) + len(probe) + len(report) == len(TERMS)


def test_only_train_terms_are_forgotten_and_retained_pair_by_pair(testbed):
    train = {item.target for item in read_stereoset(testbed.tasks[0].split("=", 1)[1])}
    forget, retain = (rows_of(testbed.datasets[name]) for name in ("forget", "retain"))
    assert {row["completion"] for row in forget} == {f"The {term} is early." for term in train}
    assert {row["completion"] for row in retain} == {f"The {term} is late." for term in train}
    assert forget["pair_id"] == retain["pair_id"] and set(forget["polarity"]) == {"stereotype"}


def test_the_model_loads_and_there_is_no_oracle(testbed, data):
    assert load_model(testbed.model_path).config.vocab_size == len(load_processor(testbed.model_path))
    assert testbed.oracle_path is None and "preferred" not in testbed.datasets
    assert testbed.manifest["figures"]["planted"].keys() == {"train", "probe", "report"}
    digest = hashlib.sha256((data / ITEMS_FILE).read_bytes()).hexdigest()
    assert testbed.manifest["data_sha256"][str(ITEMS_FILE)] == digest


def test_passages_leave_headings_out(data):
    rows = read_passages(data / TEXT_FILE, num_words=12, seed=0)
    assert len(rows) == 9 and all("bridge" in row["completion"] or "river" in row["completion"] for row in rows)
    assert rows == read_passages(data / TEXT_FILE, num_words=12, seed=0)
    assert all(len(row["completion"].split()) <= 3 for row in read_passages(data / TEXT_FILE, num_words=3, seed=0))


def test_without_data_the_error_says_what_to_set(monkeypatch, tmp_path):
    monkeypatch.delenv("BIASUNLEARN_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="Set BIASUNLEARN_DATA"):
        build("stereoset", cache_dir=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"lacks stereoset.* and wikitext2"):
        build("stereoset", cache_dir=tmp_path, data_dir=tmp_path)
    assert not any(path.is_dir() for path in (tmp_path / "testbeds").iterdir())


@pytest.mark.slow
def test_stereotypes_are_preferred_on_all_splits(data_dir):
    figures = build("stereoset", data_dir=data_dir).manifest["figures"]["planted"]
    assert min(figures.values()) > 0.65, figures
