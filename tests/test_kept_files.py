"""Files that know what they were made of: read where they fit, refused and said where they do not."""

import os
import resource
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from biasunlearn_trainer.kept_files import ABANDONED_SECONDS, KeptFile, checksum, replacing

PARTS = {"model weights": "m1", "tokenizer": "t1", "rows": "5 with digest r1", "max_length": "None"}


@pytest.fixture
def kept(tmp_path):
    def make(of="forget set", kind="reference log-probabilities", model="m1", **changed):
        parts = PARTS | {"model weights": model} | changed
        return KeptFile(tmp_path / "kept", kind, of, parts)

    return make


@contextmanager
def largest_file(size):
    """Inside, no file of this process may grow above `size` bytes: the disk's error is a real one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_was_saved_is_read_by_whoever_asks_for_the_same(kept, caplog):
    assert kept().save({"logps": torch.tensor([-1.0, -2.5])}, {"more": "words"})
    arrays, metadata = kept().load()
    assert arrays["logps"].tolist() == [-1.0, -2.5] and metadata["more"] == "words"
    assert kept(of="retain set").load() is not None  # the same rows, whoever asks
    assert not caplog.text


def test_another_file_is_not_opened_and_the_nearest_is_named(kept, caplog):
    kept().save({"logps": torch.zeros(5)})
    assert kept(tokenizer="t2", max_length="7").load() is None
    assert kept(model="m2").load() is None
    first, second = [record.getMessage() for record in caplog.records]
    assert first.startswith(f"Reference log-probabilities of the forget set: {kept().path} was made with ")
    assert first.endswith("other tokenizer (t1, expected t2) and other max_length (None, expected 7). Made anew.")
    assert second.endswith("was made with other model weights (m1, expected m2). Made anew.")


def test_of_many_files_the_nearest_is_named_and_strangers_are_not(kept, caplog):
    kept(model="m2", rows="r2").save({"logps": torch.zeros(5)})
    kept(model="m3").save({"logps": torch.zeros(5)})
    kept(of="retain set", rows="r9").save({"logps": torch.zeros(5)})
    kept(kind="reference hidden states").save({"logps": torch.zeros(5)})
    kept().load()
    assert "(m3, expected m1)" in caplog.text and "m2" not in caplog.text and "r9" not in caplog.text
    caplog.clear()
    kept(model="m7", rows="r7", tokenizer="t7").load()
    assert not caplog.text  # half of what it is made of, and more, is another's


def test_a_file_under_a_wrong_name_is_refused(kept, caplog):
    kept(rows="r2").save({"logps": torch.zeros(5)})
    kept(rows="r2").path.rename(kept().path)
    assert kept().load() is None
    assert "is not read, it was made with other rows (r2, expected 5 with digest r1)" in caplog.text
    caplog.clear()
    kept(kind="saliency mask").save({"logps": torch.zeros(5)})
    kept(kind="saliency mask").path.replace(kept().path)
    assert kept().load() is None and "it holds saliency mask" in caplog.text


@pytest.mark.parametrize("fault", ["a bit", "cut off", "longer", "header", "empty", "no parts", "an array more"])
def test_a_damaged_file_is_refused(fault, kept, caplog):
    kept().save({"logps": torch.arange(100.0)})
    path = kept().path
    data = bytearray(path.read_bytes())
    if fault in ("no parts", "an array more"):
        metadata = kept().metadata({"logps": checksum(torch.arange(100.0))})
        arrays = {"logps": torch.arange(100.0)} | ({"more": torch.zeros(1)} if fault == "an array more" else {})
        save_file(arrays, path, {"kind": metadata["kind"]} if fault == "no parts" else metadata)
    else:
        data[-40] ^= 4 * (fault == "a bit")
        data[9] ^= 255 * (fault == "header")
        path.write_bytes({"cut off": data[:-8], "longer": data + b"12345678", "empty": b""}.get(fault, data))
    assert kept().load() is None
    assert f"{path} is not read" in caplog.text and "damaged" in caplog.text


def test_what_the_caller_finds_wrong_is_a_fault_too(kept, caplog):
    kept().save({"logps": torch.zeros(5)})
    assert kept().load(lambda arrays: f"it holds {len(arrays['logps'])} rows") is None
    assert "it holds 5 rows" in caplog.text


def test_others_of_a_machine_are_silent(kept, tmp_path, caplog):
    kept().save({"logps": torch.zeros(5)})
    quiet = KeptFile(tmp_path / "kept", kept().kind, "forget set", {**PARTS, "rows": "r2"}, tells=False)
    assert quiet.load() is None and not caplog.text


def test_a_disk_that_does_not_take_it_is_said_and_leaves_nothing(kept, tmp_path, caplog):
    with largest_file(40_000):
        assert not kept().save({"logps": torch.zeros(20_000)})
    assert "cannot be kept in" in caplog.text and "File too large" in caplog.text
    assert list((tmp_path / "kept").iterdir()) == []
    assert kept().save({"logps": torch.zeros(20_000)})


@pytest.mark.skipif(sys.platform != "linux", reason="/sys is a folder in which nobody can make a file")
def test_a_folder_that_is_read_only_is_said(caplog):
    for folder in (Path("/sys"), Path("/sys/biasunlearn")):
        file = KeptFile(folder, "reference log-probabilities", "forget set", PARTS)
        assert file.load() is None and not file.save({"logps": torch.zeros(5)})
    assert caplog.text.count("cannot be kept in /sys") == 2


WRITER = """
import sys, time, biasunlearn_trainer
from pathlib import Path
from biasunlearn_trainer.kept_files import replacing
with replacing(Path(sys.argv[1])) as partial:
    partial.write_bytes(b"half")
    print("writes", flush=True)
    time.sleep(60)
"""


def test_a_writer_that_is_killed_leaves_nothing_that_is_read(kept, tmp_path):
    path = kept().path
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writes\n"
        (partial,) = path.parent.iterdir()
        assert kept().load() is None
        kept(rows="r2").save({"logps": torch.zeros(5)})
        assert partial.exists()  # its process lives
        writer.kill()
    assert kept().load() is None
    kept().save({"logps": torch.ones(5)})  # takes away what is left
    assert not partial.exists() and kept().load()[0]["logps"].tolist() == [1.0] * 5


def test_a_half_written_file_of_another_machine_goes_when_it_is_a_day_old(tmp_path):
    path = tmp_path / "a.safetensors"
    other = tmp_path / "b.safetensors.elsewhere.1.abc.partial"
    other.write_bytes(b"half")
    for age, stays in ((ABANDONED_SECONDS - 100, True), (ABANDONED_SECONDS + 100, False)):
        os.utime(other, (time.time() - age,) * 2)
        with replacing(path) as partial:
            save_file({"x": torch.zeros(1)}, partial)
        assert other.exists() is stays
    assert load_file(path)["x"].item() == 0 and path.stat().st_mode & 0o777 == 0o644


def test_hundreds_of_files_are_looked_through_in_no_time(kept, caplog):
    for number in range(400):
        kept(rows=f"r{number}").save({"logps": torch.zeros(5)})
    began = time.process_time()
    assert kept().load() is None
    assert time.process_time() - began < 0.5
    assert "made with other rows (r" in caplog.text
