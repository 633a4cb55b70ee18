"""Pictures are decoded and processed in the workers of the data loader, over several epochs, forked or spawned."""

import io

import pytest
from datasets import Dataset, Features, List, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image


@pytest.fixture
def pictured(image_rows, tmp_path):
    """A memory-mapped set whose pictures lie encoded in it."""

    def make(number, name):
        rows = image_rows(number, name)
        features = Features(prompt=Value("string"), completion=Value("string"), images=List(ImageFeature()))
        columns = {key: [row[key] for row in rows] for key in features}
        columns["images"] = [[{"bytes": encoded(image), "path": None} for image in row] for row in columns["images"]]
        Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / name)
        return load_from_disk(tmp_path / name)

    return make


def encoded(picture):
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def counted(monkeypatch, trainer):
    """Names of what this process, and no worker, is called for."""
    calls, opened, collate = [], Image.open, trainer.collator._encode
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: (calls.append("open"), opened(*args, **kwargs))[1])
    trainer.collator._encode = lambda *args, **kwargs: (calls.append("process"), collate(*args, **kwargs))[1]
    return calls


def run(make_trainer, pictured, monkeypatch, **settings):
    """The losses of three epochs of seven rows by two, and what the main process was called for."""
    sets = {"forget_dataset": pictured(7, "f"), "retain_dataset": pictured(5, "r")}
    trainer = make_trainer("ga_diff", "image", datasets=sets, max_steps=-1, num_train_epochs=3, **settings)
    with monkeypatch.context() as patch:
        calls = counted(patch, trainer)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], calls


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_decode_and_process_and_change_nothing(persistent, make_trainer, pictured, monkeypatch):
    alone, calls = run(make_trainer, pictured, monkeypatch)
    assert len(alone) == 12
    # Forget and retain pictures of each epoch: seven and, beside the last single one, as many.
    assert calls.count("open") == 3 * 14 and calls.count("process") > 0
    helped, calls = run(
        make_trainer, pictured, monkeypatch, dataloader_num_workers=2, dataloader_persistent_workers=persistent,
        dataloader_prefetch_factor=3,
    )  # fmt: skip
    assert helped == alone
    assert calls == []


@pytest.mark.slow
@pytest.mark.parametrize("context", ["spawn", "forkserver"])
def test_workers_that_share_no_memory(context, make_trainer, pictured, monkeypatch):
    alone, _ = run(make_trainer, pictured, monkeypatch)
    sets = {"forget_dataset": pictured(7, "f"), "retain_dataset": pictured(5, "r")}
    trainer = make_trainer(
        "ga_diff", "image", datasets=sets, max_steps=-1, num_train_epochs=3, dataloader_num_workers=1,
        dataloader_persistent_workers=True, dataloader_multiprocessing_context=context,
    )  # fmt: skip
    trainer.train()
    assert [entry["loss"] for entry in trainer.state.log_history if "loss" in entry] == alone
