"""Records of a model: made once, and again whenever something changed that could change them."""

import json

import pytest
import torch
from PIL import Image

from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor
from biasunlearn_trainer.runner import record_cache
from biasunlearn_trainer.runner.record_cache import RecordCache


@pytest.fixture
def scorer(tiny_llava):
    return Scorer(load_model(str(tiny_llava)), load_processor(str(tiny_llava)), batch_size=4)


@pytest.fixture
def make_task(tmp_path):
    def make(colour=(9, 9, 9), rejected=" The short one.", name="planted"):
        Image.new("RGB", (32, 32), colour).save(tmp_path / "face.png")
        row = {"prompt": "Who was late?", "completion": " Nobody knows.", "rejected": rejected, "kind": "ambiguous"}
        rows = [{**row, "prompt": f"{row['prompt']} {i}", "images": "face.png"} for i in range(3)]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_task(f"{name}={path}")

    return make


@pytest.fixture
def count_runs(monkeypatch):
    runs = []

    def count(task):
        run = type(task).run

        def counted(self, *args, **kwargs):
            runs.append(self.name)
            return run(self, *args, **kwargs)

        monkeypatch.setattr(type(task), "run", counted)
        return runs

    return count


def test_records_are_made_once_and_summarised_alike(scorer, make_task, count_runs, tmp_path):
    task = make_task()
    runs, cache = count_runs(task), RecordCache(tmp_path / "records")
    first = cache.run([task], scorer, answers=True)
    again = cache.run([make_task()], scorer, answers=True)
    assert runs == ["planted"]
    assert task.summarise(first["planted"]) == task.summarise(again["planted"])
    assert json.loads(json.dumps(first)) == again


@pytest.mark.parametrize("changed", ["picture", "rejected", "name", "answers", "batch", "weights", "code"])
def test_whatever_changes_makes_them_anew(changed, scorer, make_task, count_runs, tmp_path, monkeypatch):
    task = make_task()
    runs, cache = count_runs(task), RecordCache(tmp_path / "records")
    cache.run([task], scorer, answers=False)
    if changed == "picture":
        task = make_task(colour=(200, 9, 9))
    if changed == "rejected":
        task = make_task(rejected=" The tall one.")
    if changed == "name":
        task = make_task(name="planted@other")
    if changed == "batch":
        scorer.batch_size = 2
    if changed == "weights":
        with torch.no_grad():
            next(scorer.model.parameters()).view(-1)[0] += 1
    if changed == "code":
        monkeypatch.setattr(record_cache, "code_fingerprint", lambda: "other")
    cache.run([task], scorer, answers=changed == "answers")
    assert len(runs) == 2


@pytest.mark.parametrize("fault", ["cut off", "changed", "renamed", "of an earlier version"])
def test_what_cannot_be_trusted_is_made_anew(fault, scorer, make_task, count_runs, tmp_path, caplog):
    task = make_task()
    runs, cache = count_runs(task), RecordCache(tmp_path / "records")
    first = cache.run([task], scorer, answers=False)
    (path,) = (tmp_path / "records").iterdir()
    text = path.read_text()
    if fault == "renamed":
        cache.run([make_task(rejected=" The tall one.")], scorer, answers=False)
        (other,) = set((tmp_path / "records").iterdir()) - {path}
        text = other.read_text()
        runs.pop()
    cuts = {"cut off": text[:-9], "changed": text.replace("planted", "planned"), "of an earlier version": "[]"}
    path.write_text(cuts.get(fault, text))
    assert cache.run([make_task()], scorer, answers=False) == json.loads(json.dumps(first))
    assert len(runs) == 2 and f"{path} is not read" in caplog.text
    assert cache.run([make_task()], scorer, answers=False) == json.loads(json.dumps(first))
    assert len(runs) == 2


def test_records_that_no_disk_takes_are_made_all_the_same(scorer, make_task, tmp_path, caplog):
    (tmp_path / "records").write_text("a file where a folder should be")
    made = RecordCache(tmp_path / "records").run([make_task()], scorer, answers=False)
    assert len(made["planted"]) == 3 and "Records cannot be kept in" in caplog.text
