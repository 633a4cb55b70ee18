"""What ends a run from outside, by its real cause: signals, a full disk, too little memory, numbers that are none."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerControl, TrainerState, TrainingArguments

from biasunlearn_trainer.checkpoints import UNFINISHED, last_usable
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import main, run
from biasunlearn_trainer.runner.interrupts import Interrupted, Interrupts


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folder of a forget and a retain set."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("forget", "retain"):
        rows = [{"prompt": f"Who was {name} {i}?", "completion": f" The {name} one."} for i in range(8)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def keys(data, tmp_path, tiny_llama) -> dict:
    """An npo recipe of six steps."""
    return {
        "method": "npo",
        "model_name_or_path": str(tiny_llama),
        "forget_dataset": str(data / "forget.jsonl"),
        "retain_dataset": str(data / "retain.jsonl"),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-3,
        "logging_steps": 2,
        "save_steps": 3,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "case_studies": 0,
        "output_dir": str(tmp_path / "out"),
    }


@pytest.fixture
def words(monkeypatch, tmp_path):
    """`words(keys, *more)`: the command line of a run in this process."""
    monkeypatch.setenv("BIASUNLEARN_CACHE", str(tmp_path / "cache"))

    def build(keys: dict, *more: str) -> list[str]:
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps(keys))
        return [str(path), *more]

    return build


def in_training(started, seconds: float = 120) -> None:
    """Waits until a run takes steps."""
    until = time.monotonic() + seconds
    while not any(function == "training_step" for _, function in started.stack()):
        assert started.poll() is None and time.monotonic() < until, started.log.read_text()[-2000:]
        time.sleep(0.01)


def test_signals_finish_the_step_save_and_leave_with_the_usual_status(keys, start_run, tmp_path):
    """Ctrl-C, continued, SIGTERM, continued: the weights of a run that nobody disturbed."""
    keys |= {"max_steps": 24, "save_steps": 24}
    whole = start_run(keys | {"output_dir": str(tmp_path / "whole")})
    stopped_at = []
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stopped = start_run(keys, *(["--resume_from_checkpoint", "true"] if stopped_at else []))
        in_training(stopped)
        stopped.signal(number)
        assert stopped.wait() == status, stopped.log.read_text()[-2000:]
        stopped_at.append(int(last_usable(tmp_path / "out").name.partition("-")[2]))
        said = stopped.log.read_text()
        assert "finishing the step and saving" in said and f"Interrupted after step {stopped_at[-1]} of 24" in said
        assert "Traceback" not in said
    assert 0 < stopped_at[0] < stopped_at[1] < 24
    assert start_run(keys, "--resume_from_checkpoint", "true").wait() == 0
    assert whole.wait() == 0
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out")]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())


def test_a_second_signal_stops_at_once():
    interrupts, before = Interrupts(), signal.getsignal(signal.SIGINT)
    control = TrainerControl()
    with pytest.raises(Interrupted, match="at once") as caught, interrupts.deferred():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, passed on by a launcher
        interrupts.on_step_end(TrainingArguments("nowhere", use_cpu=True), TrainerState(), control)
        assert control.should_save and control.should_training_stop
        interrupts._since -= 2
        os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.exit_status == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_after_the_last_step_is_not_lost():
    with pytest.raises(Interrupted, match="when the training was over") as caught, Interrupts().deferred():
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_status == 143


def test_a_full_disk_keeps_the_checkpoint_before(keys, start_run, tmp_path):
    """A limit on the size of files is what a full disk is to a program that writes."""
    assert start_run(keys | {"max_steps": 3}).wait() == 0
    size = (tmp_path / "out" / "checkpoint-3" / "model.safetensors").stat().st_size
    full = start_run(keys, "--resume_from_checkpoint", "true", RLIMIT_FSIZE=size // 2)
    assert full.wait() == 1
    said = full.log.read_text()
    for part in ("checkpoint-6 could not be written", "MiB are free", "checkpoint-3 is whole", "save_total_limit"):
        assert part in said
    assert "Traceback" not in said
    assert last_usable(tmp_path / "out").name == "checkpoint-3"
    assert not (tmp_path / "out" / "checkpoint-6").exists() and not list((tmp_path / "out").glob(f"{UNFINISHED}/*"))
    assert start_run(keys, "--resume_from_checkpoint", "true").wait() == 0


def test_too_little_memory_names_what_takes_less(keys, start_run, tmp_path):
    rows = [{"prompt": f"{i} " + "Who was it? " * 19, "completion": " Nobody."} for i in range(200)]
    for name in ("forget", "retain"):
        text = "".join(json.dumps({**row, "prompt": name + row["prompt"]}) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
        keys[f"{name}_dataset"] = str(tmp_path / f"{name}.jsonl")
    batch = {"per_device_train_batch_size": 200, "per_device_eval_batch_size": 4, "eval_batch_size": 4}
    short = start_run(keys | batch, RLIMIT_AS=300 * 2**20)
    assert short.wait() == 1, short.log.read_text()[-3000:]
    said = short.log.read_text()
    for part in (
        "Out of memory in training",
        "per_device_train_batch_size: 200, gradient_accumulation_steps: 1",
        "use_peft: False",
        "activation_checkpointing: False",
        "No checkpoint was written yet",
    ):
        assert part in said
    assert "Traceback" not in said


def test_an_output_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(keys, words, tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/nowhere/out")):
        recipe = parse_recipe(words(keys | {"output_dir": str(folder), "model_name_or_path": "/no/such/model"}))
        with pytest.raises(RecipeError, match="nothing can be written into") as caught:
            run(recipe)
        assert str(folder) in str(caught.value) and "/no/such/model" not in str(caught.value)


def test_a_gradient_that_is_no_number_ends_the_run_with_the_weights_before_it(keys, words, tmp_path, capsys):
    assert main(words(keys, "--method", "ga", "--learning_rate", "1e30", "--logging_steps", "1")) == 1
    said = capsys.readouterr().err
    assert "step 2: the gradient's norm is nan" in said and "checkpoint-1" in said and "learning_rate" in said
    kept = load_file(tmp_path / "out" / "checkpoint-1" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in kept.values())
    assert not (tmp_path / "out" / "model.safetensors").exists()


# Going on with what does not fit.


def faults(arguments: list[str]) -> str:
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(arguments))
    return str(caught.value)


@pytest.fixture(scope="module")
def begun_once() -> dict:
    """The folder of the run below, once it was made."""
    return {}


@pytest.fixture
def begun(keys, words, tmp_path, begun_once, tmp_path_factory):
    """A run of three steps, to be continued; its records of the model before training lie in its folder."""
    if not begun_once:
        begun_once["folder"] = tmp_path_factory.mktemp("begun") / "out"
        run(parse_recipe(words(keys | {"max_steps": 3, "output_dir": str(begun_once["folder"])})))
        shutil.copytree(tmp_path / "cache" / "records", begun_once["folder"] / "records")
    shutil.copytree(begun_once["folder"], tmp_path / "out")
    return tmp_path / "out" / "checkpoint-3"


def test_only_what_wrote_a_checkpoint_goes_on_from_it(begun, keys, words, tmp_path, tiny_llama, monkeypatch):
    resume = ["--resume_from_checkpoint", str(begun), "--output_dir", str(tmp_path / "other")]
    shutil.copytree(tiny_llama, tmp_path / "another_model")
    monkeypatch.setattr(sys.modules[run.__module__], "load_for_run", None)  # all of this is known before
    said = faults(words(keys, *resume, "--method", "simnpo"))
    assert "`method: npo`" in said
    (begun.parent / "recipe.resolved.yaml").unlink()  # then the checkpoint itself says it
    said = faults(words(keys, *resume, "--method", "simnpo"))
    assert "written with the method NPOTrainer, this run has SimNPOTrainer" in said
    assert f"set model_name_or_path: {begun}" in said
    said = faults(words(keys, *resume, "--model_name_or_path", str(tmp_path / "another_model")))
    assert f"written with the model {Path(tiny_llama).name}, this run has another_model" in said
    said = faults(words(keys, *resume, "--per_device_train_batch_size", "4"))
    assert "2 rows in a step (1 processes), this launch has 4 (1 processes)" in said
    seal = begun / "complete.json"
    seal.write_text(seal.read_text().replace('"backend": "whole"', '"backend": "ZeRO-3"'))
    assert "written under ZeRO-3, this launch is whole" in faults(words(keys, *resume))


def test_the_same_rows_in_a_step_by_other_means_go_on(begun, keys, words):
    more = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"]
    assert set(run(parse_recipe(words(keys, "--resume_from_checkpoint", "true", *more)))) == {"before", "after"}


def test_a_broken_checkpoint_is_named_or_passed_over(begun, keys, words, caplog):
    weights = begun / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    said = faults(words(keys, "--resume_from_checkpoint", str(begun)))
    assert "is no complete checkpoint: model.safetensors has" in said
    run(parse_recipe(words(keys, "--resume_from_checkpoint", "true")))
    assert f"{begun} is skipped: model.safetensors has" in caplog.text
    assert "starts from the beginning" in caplog.text
    assert last_usable(begun.parent).name == "checkpoint-6"


def test_other_rows_and_other_weights_are_another_run(begun, keys, words, data):
    environment = json.loads((begun.parent / "environment.json").read_text())
    path = data / "forget.jsonl"
    text = path.read_text()
    path.write_text(text.replace("Who was forget 3", "Who was not forgotten"))
    assert "forget_dataset: its rows are not those" in faults(words(keys, "--resume_from_checkpoint", "true"))
    path.write_text(text)
    environment["model"]["fingerprint"] = "0123456789abcdef"
    (begun.parent / "environment.json").write_text(json.dumps(environment))
    said = faults(words(keys, "--resume_from_checkpoint", "true"))
    assert "had the fingerprint 0123456789abcdef" in said and "no other base than its own" in said


def test_what_was_measured_before_training_is_not_measured_again(begun, keys, words, tmp_path, monkeypatch):
    """The records lie in the run's own folder until it ends, whatever becomes of the cache."""
    from biasunlearn_trainer.runner import record_cache

    asked = []
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    broadcast = record_cache.broadcast_object_list
    monkeypatch.setattr(record_cache, "broadcast_object_list", lambda found: asked.append(found[0]) or broadcast(found))
    run(parse_recipe(words(keys, "--resume_from_checkpoint", "true")))
    assert asked and all(records is not None for records in asked)
    assert not (begun.parent / "records").exists()


@pytest.mark.slow
def test_a_small_disk_that_is_full(keys, words, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a file system")
    try:
        assert main(words(keys | {"output_dir": str(disk / "out"), "save_steps": 1, "save_total_limit": 9})) == 1
        said = capsys.readouterr().err
        assert "could not be written" in said and "The disk is full" in said
        assert last_usable(disk / "out") is not None
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_ctrl_c_stops_two_processes_after_the_same_step(keys, tmp_path):
    keys |= {"max_steps": 3000, "save_steps": 3000, "per_device_train_batch_size": 1}
    (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
    script = Path(__file__).resolve().parents[2] / "recipes" / "run.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "BIASUNLEARN_CACHE": str(tmp_path / "cache")}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [*launch, str(tmp_path / "recipe.yaml")], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    until = time.monotonic() + 240
    while "'loss'" not in (tmp_path / "log").read_text():
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "log").read_text()[-2000:]
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(timeout=120)
    assert last_usable(tmp_path / "out") is not None, (tmp_path / "log").read_text()[-3000:]
    keys |= {
        "max_steps": int(last_usable(tmp_path / "out").name.partition("-")[2]) + 2,
        "per_device_train_batch_size": 2,
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(keys))
    # One process goes on with the rows of two.
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "recipe.yaml"), "--resume_from_checkpoint", "true"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "was written by 2 processes, 1 continue" in done.stderr
