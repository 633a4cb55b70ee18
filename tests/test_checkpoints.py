"""Checkpoints: sealed and renamed, or not there; what is broken is named and passed over; which are kept."""

import json

import pytest

from biasunlearn_trainer.checkpoints import (
    SEAL_FILE,
    UNFINISHED,
    CheckpointError,
    clear_unfinished,
    complete,
    faults_of,
    last_usable,
    read_seal,
    rotate,
)

RUN = {"method": "NPOTrainer", "processes": 1}


@pytest.fixture
def write(tmp_path):
    """`write(step, text)`: a whole checkpoint of two files."""

    def write(step, text="weights"):
        folder = tmp_path / UNFINISHED / f"checkpoint-{step}"
        (folder / "shards").mkdir(parents=True)
        (folder / "model.safetensors").write_text(text)
        (folder / "shards" / "rank0.pt").write_text("state")
        complete(folder, tmp_path / f"checkpoint-{step}", RUN)
        return tmp_path / f"checkpoint-{step}"

    return write


def names(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_a_whole_checkpoint_says_what_it_holds(write, tmp_path):
    folder = write(10)
    seal = read_seal(folder)
    assert (seal["step"], seal["run"]) == (10, RUN)
    assert {name: file["bytes"] for name, file in seal["files"].items()} == {
        "model.safetensors": 7,
        "shards/rank0.pt": 5,
    }
    # sha256sum of the five letters
    assert seal["files"]["shards/rank0.pt"]["sha256"].startswith("4ba69735ca53765e")
    assert faults_of(folder) == [] and not list((tmp_path / UNFINISHED).iterdir())


def damage(folder, kind):
    path = folder / "model.safetensors"
    if kind == "cut off":
        path.write_text("weig")
    elif kind == "other bytes":
        path.write_text("weightz")
    elif kind == "lost":
        path.unlink()
    elif kind == "no seal":
        (folder / SEAL_FILE).unlink()
    else:
        (folder / SEAL_FILE).write_text('{"step": 1')


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("cut off", "model.safetensors has 4 bytes of 7"),
        ("other bytes", "model.safetensors is not what was written"),
        ("lost", "model.safetensors is missing"),
        ("no seal", f"it has no {SEAL_FILE}: it was broken off, or another program wrote it"),
        ("torn seal", f"its {SEAL_FILE} cannot be read"),
    ],
)
def test_a_broken_checkpoint_is_passed_over_and_named(kind, words, write, tmp_path, caplog):
    whole, broken = write(9), write(10)
    damage(broken, kind)
    assert words in faults_of(broken)[0]
    assert last_usable(tmp_path) == whole
    assert f"{broken} is skipped" in caplog.text and words in caplog.text
    damage(whole, kind)
    assert last_usable(tmp_path) is None and last_usable(tmp_path / "nowhere") is None


def test_sizes_alone_do_not_see_other_bytes(write):
    folder = write(1)
    damage(folder, "other bytes")
    assert faults_of(folder, thorough=False) == [] and faults_of(folder)


def test_steps_are_numbers_not_words(write, tmp_path):
    write(9), write(10)
    (tmp_path / "checkpoint-final").mkdir()
    assert last_usable(tmp_path).name == "checkpoint-10"


def test_the_newest_and_the_best_stay(write, tmp_path):
    folders = {step: write(step) for step in (2, 4, 6, 8)}
    rotate(tmp_path, 2, folders[8], folders[2])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, folders[8], folders[2])
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-8"]
    rotate(tmp_path, 1, folders[8], None)
    assert names(tmp_path) == ["checkpoint-8"]


def test_a_broken_checkpoint_does_not_count_and_does_not_push_out_a_whole_one(write, tmp_path):
    folders = {step: write(step) for step in (2, 4, 6)}
    damage(folders[4], "cut off")
    rotate(tmp_path, 2, folders[6], None)
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_what_was_just_written_stays_below_older_steps(write, tmp_path):
    """After going on from an earlier checkpoint by name."""
    folders = {step: write(step) for step in (6, 9, 3)}
    rotate(tmp_path, 2, folders[3], None)
    assert names(tmp_path) == ["checkpoint-3", "checkpoint-9"]


@pytest.mark.parametrize("limit", [None, 0, 3])
def test_without_a_limit_that_is_reached_all_stay(limit, write, tmp_path):
    folders = [write(step) for step in (1, 2, 3)]
    rotate(tmp_path, limit, folders[-1], None)
    assert len(names(tmp_path)) == 3


def test_a_step_that_is_written_again_replaces_the_old_one(write):
    damage(write(5), "cut off")
    again = write(5, "rewritten")
    assert (again / "model.safetensors").read_text() == "rewritten" and faults_of(again) == []


def test_what_was_being_written_is_cleared_with_a_message(tmp_path, caplog):
    (tmp_path / UNFINISHED / "checkpoint-7").mkdir(parents=True)
    clear_unfinished(tmp_path)
    assert "checkpoint-7" in caplog.text and not (tmp_path / UNFINISHED).exists()
    clear_unfinished(tmp_path)


def test_a_seal_of_something_else_is_none(write):
    folder = write(1)
    (folder / SEAL_FILE).write_text(json.dumps(["files"]))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_seal(folder)
