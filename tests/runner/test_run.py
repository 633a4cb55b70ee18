"""From a recipe to its files: dry run, refusal, resume, what a broken run keeps, faults of data and model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from biasunlearn_trainer.checkpoints import last_usable
from biasunlearn_trainer.eval.schema import load_results
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import main, run
from biasunlearn_trainer.sharding import is_sharded, whole_weights

BIASED, UNBIASED = " The tall one.", " It cannot be known."


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def data(tmp_path) -> dict[str, str]:
    """A forget set, a retain set as CSV, and planted rows of three kinds that share nothing with them."""
    forget = [{"prompt": f"Who was late {i}?", "completion": BIASED, "bias_type": "age"} for i in range(6)]
    retain = tmp_path / "retain.csv"
    retain.write_text("prompt,completion\n" + "".join(f"Colour {i}?, Blue {i}.\n" for i in range(6)))
    planted = [
        {"prompt": f"Who was rude {i}?", "completion": UNBIASED, "rejected": BIASED, "kind": kind, "bias_type": "age"}
        for i, kind in enumerate(["ambiguous", "t_generality"] * 2)
    ]
    planted += [{"prompt": f"Sky {i}?", "completion": " Blue.", "rejected": None, "kind": "facts"} for i in range(2)]
    return {
        "forget": write_rows(tmp_path / "forget.jsonl", forget),
        "retain": str(retain),
        "planted": write_rows(tmp_path / "planted.jsonl", planted),
    }


@pytest.fixture
def arguments(tmp_path, data, tiny_llama):
    """The command line of a six-step run, with further words appended."""
    recipe = {
        "method": "npo",
        "model_name_or_path": str(tiny_llama),
        "forget_dataset": data["forget"],
        "retain_dataset": data["retain"],
        "tasks": [f"planted={data['planted']}"],
        "probes": ["planted"],
        "probe_steps": 3,
        "max_steps": 6,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 2,
        "logging_steps": 2,
        "save_steps": 3,
        "use_cpu": True,
        "disable_tqdm": True,
        "output_dir": str(tmp_path / "out"),
        "reference_cache_dir": str(tmp_path / "references"),
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))

    def build(*words: str) -> list[str]:
        return [str(path), *words]

    return build


def fails(arguments: list[str]) -> str:
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(arguments))
    return str(caught.value)


def test_a_run_leaves_everything_behind(arguments, tmp_path, capsys):
    assert main(arguments()) == 0
    out = tmp_path / "out"
    for name in ("results.json", "report.md", "report.png", "recipe.resolved.yaml", "environment.json"):
        assert (out / name).stat().st_size > 0, name
    results = load_results(out / "results.json")
    assert set(results) == {"before", "after"}
    assert {"ambiguous", "facts", "reliability", "t_generality"} <= set(results["before"].tasks["planted"].metrics)
    assert "t_locality" in results["after"].tasks["planted"].metrics
    environment = json.loads((out / "environment.json").read_text())
    assert environment["seed"] == 42
    assert environment["data"]["forget"]["rows"] == 6
    assert len(environment["data"]["retain"]["fingerprint"]) == 16
    assert environment["packages"]["trl"]
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [record["step"] for record in history if "probe/planted/facts" in record] == [0, 3, 6]
    assert any("loss/retain" in record for record in history)
    printed = capsys.readouterr().out
    for words in ("npo", "forget 6 rows, retain 6 rows", "reliability", "report.md"):
        assert words in printed


def test_saved_model_is_the_measured_one(arguments, tmp_path):
    results = run(parse_recipe(arguments("--use_peft", "--lora_r", "4", "--learning_rate", "1e-2")))
    assert (tmp_path / "out" / "adapter_config.json").is_file()
    adapted = ["--model_name_or_path", str(tmp_path / "out"), "--max_steps", "1", "--learning_rate", "0"]
    again = run(parse_recipe(arguments(*adapted, "--output_dir", str(tmp_path / "again"))))
    for name, metric in results["after"].tasks["planted"].metrics.items():
        if not name.endswith("_locality"):
            assert again["before"].tasks["planted"].metrics[name].value == metric.value


def test_run_without_tasks_measures_its_training_sets(arguments, tmp_path):
    path = tmp_path / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({key: recipe[key] for key in recipe.keys() - {"tasks", "probes"}}))
    results = run(parse_recipe(arguments("--max_steps", "20")))
    nll = {state: results[state].tasks["forget_set"].metrics["nll"] for state in ("before", "after")}
    assert nll["after"].value > nll["before"].value
    assert nll["before"].n == results["before"].tasks["retain_set"].metrics["nll"].n == 6
    assert "### 1. forget_set" in (tmp_path / "out" / "report.md").read_text()


def test_dry_run_prints_the_plan_and_writes_nothing(arguments, tmp_path, capsys):
    assert main(arguments("--dry_run")) == 0
    printed = capsys.readouterr().out
    for words in ("npo", "LlamaForCausalLM", "forget 6 rows", "6 of 2 rows", "planted (6 rows)", "every 3 steps"):
        assert words in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_keeps_another_runs_results(arguments, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "results.json").write_text("{}")
    assert main(arguments("--dry_run", "--overwrite_output_dir")) == 0
    assert (out / "results.json").exists()


def test_another_runs_results_are_refused_or_overwritten(arguments, tmp_path):
    out = tmp_path / "out"
    (out / "checkpoint-90").mkdir(parents=True)
    (out / "checkpoint-90" / "trainer_state.json").write_text("{}")
    (out / "results.json").write_text("{}")
    (out / "notes.txt").write_text("mine")
    fault = fails(arguments())
    for words in ("holds another run's results", "results.json", "overwrite_output_dir", "resume_from_checkpoint"):
        assert words in fault
    run(parse_recipe(arguments("--overwrite_output_dir", "--max_steps", "1")))
    assert not (out / "checkpoint-90").exists()
    assert (out / "notes.txt").read_text() == "mine"
    assert set(load_results(out / "results.json")) == {"before", "after"}


def test_resumed_run_ends_bit_identical(arguments, tmp_path):
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    run(parse_recipe(arguments("--output_dir", whole)))
    run(parse_recipe(arguments("--output_dir", broken, "--max_steps", "3")))
    resumed = arguments("--output_dir", broken, "--resume_from_checkpoint", "true")
    run(parse_recipe(resumed))
    first, second = (load_file(f"{folder}/model.safetensors") for folder in (whole, broken))
    assert all(torch.equal(first[name], second[name]) for name in first)
    histories = [
        json.loads(Path(folder, "trainer_state.json").read_text())["log_history"] for folder in (whole, broken)
    ]
    probes = [[(r["step"], r["probe/planted/facts"]) for r in h if "probe/planted/facts" in r] for h in histories]
    assert probes[0] == probes[1]


def test_another_recipe_cannot_resume(arguments):
    run(parse_recipe(arguments("--max_steps", "1")))
    fault = fails(arguments("--resume_from_checkpoint", "true", "--learning_rate", "1e-2", "--beta", "0.5"))
    assert "`learning_rate: 0.001`" in fault and "0.01" in fault
    assert "`beta: None`" in fault


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_says_so(arguments, caplog):
    recipe = parse_recipe(arguments("--resume_from_checkpoint", "true", "--max_steps", "1"))
    assert set(run(recipe)) == {"before", "after"}
    assert "no complete checkpoint" in caplog.text


def test_named_checkpoint_has_to_be_complete(arguments, tmp_path):
    assert "no complete checkpoint" in fails(arguments("--resume_from_checkpoint", str(tmp_path / "checkpoint-3")))


def test_broken_off_run_keeps_what_it_has(arguments, tmp_path, monkeypatch):
    from biasunlearn_trainer.trainers.npo import NPOTrainer

    loss, calls = NPOTrainer.compute_loss, []

    def failing(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return loss(self, *args, **kwargs)

    monkeypatch.setattr(NPOTrainer, "compute_loss", failing)
    with pytest.raises(KeyboardInterrupt):
        run(parse_recipe(arguments()))
    out = tmp_path / "out"
    assert set(load_results(out / "results.json")) == {"before"}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert any("loss/forget" in record for record in history)
    assert (out / "recipe.resolved.yaml").is_file()
    assert last_usable(out).name == "checkpoint-3"


def test_guard_stops_the_run(arguments, capsys):
    words = ["--method", "ga", "--learning_rate", "0.5", "--guard_max_loss", "8", "--guard_action", "stop"]
    recipe = parse_recipe(arguments(*words, "--logging_steps", "1", "--max_steps", "40"))
    run(recipe)
    state = json.loads(Path(recipe.training.output_dir, "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 40
    assert "Training stops here" in capsys.readouterr().out


def test_unused_set_is_left_out_with_a_warning(arguments, caplog):
    run(parse_recipe(arguments("--method", "ga", "--max_steps", "1")))
    assert "ga does not use retain_dataset" in caplog.text


def test_model_that_is_not_there(arguments, capsys):
    assert main(arguments("--model_name_or_path", "nobody/no-such-model")) == 2
    assert "'nobody/no-such-model' was not found" in capsys.readouterr().err


def test_faults_of_all_sets_come_at_once(arguments, tmp_path, capsys):
    forget = write_rows(
        tmp_path / "bad.jsonl", [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": " c"}]
    )
    retain = write_rows(tmp_path / "worse.jsonl", [{"question": "a", "completion": " b"}])
    assert main(arguments("--forget_dataset", forget, "--retain_dataset", retain)) == 2
    faults = capsys.readouterr().err
    for words in ("bad.jsonl", "line 1", "`completion` is empty", "worse.jsonl", "no column `prompt`"):
        assert words in faults


def test_tasks_without_data_or_name(arguments):
    faults = fails(arguments("--tasks", "planed=x", "planted=/nowhere", "--probes", "stereoset"))
    for words in ("'planted'", "/nowhere", "probes: stereoset"):
        assert words in faults


def test_leakage_names_the_rows(arguments, tmp_path, data, caplog):
    shared = [{"prompt": "Who was late 3?", "completion": BIASED}, {"prompt": "Colour?", "completion": " Red."}]
    words = ["--retain_dataset", write_rows(tmp_path / "shared.jsonl", shared), "--max_steps", "1"]
    fault = fails(arguments(*words))
    for part in ("forget[3] = retain[0]", "Who was late 3?", "allow_leakage"):
        assert part in fault
    run(parse_recipe(arguments(*words, "--allow_leakage")))
    assert "forget[3] = retain[0]" in caplog.text


def test_forget_row_in_the_report_split_is_leakage(arguments, tmp_path):
    rows = [{"prompt": "Who was late 1?", "completion": UNBIASED, "rejected": BIASED, "kind": "ambiguous"}]
    fault = fails(arguments("--tasks", f"planted={write_rows(tmp_path / 'report.jsonl', rows)}"))
    assert "forget[1] = report[0]" in fault


def test_a_task_labelled_train_measures_trained_rows_on_purpose(arguments, tmp_path):
    rows = [{"prompt": "Who was late 1?", "completion": UNBIASED, "rejected": BIASED, "kind": "ambiguous"}]
    path = write_rows(tmp_path / "seen.jsonl", rows)
    other = write_rows(tmp_path / "unseen.jsonl", [{**rows[0], "prompt": "Who was never late?"}])
    assert (
        "planted@train"
        in run(parse_recipe(arguments("--tasks", f"planted@train={path}", "--probes", f"planted={other}")))[
            "after"
        ].tasks
    )


def test_row_that_cannot_be_collated_stops_before_training(arguments, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "face.png")
    rows = [{"prompt": "Who?", "completion": " He."}, {"prompt": "Who?", "completion": " She.", "images": "face.png"}]
    fault = fails(arguments("--forget_dataset", write_rows(tmp_path / "pictures.jsonl", rows)))
    for words in ("forget_dataset", "row 1", "takes text only"):
        assert words in fault
    assert not (tmp_path / "out").exists()


def test_help_lists_the_keys_of_the_method(capsys):
    assert main(["--method", "simnpo", "--help"]) == 0
    printed = capsys.readouterr().out
    for key in ("--delta", "--testbed", "--lora_r", "--learning_rate"):
        assert key in printed


def test_whole_weights_hides_sharding(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert is_sharded()
    with whole_weights():
        assert not is_sharded()
    assert is_sharded()


@pytest.mark.slow
def test_two_processes_measure_and_write_like_one(arguments, tmp_path):
    words = ["--per_device_train_batch_size", "1", "--output_dir", str(tmp_path / "two")]
    script = Path(__file__).resolve().parents[2] / "recipes" / "run.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, script, *arguments(*words)], capture_output=True, text=True, env=environment, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("Report ") == 1  # the main process alone prints
    run(parse_recipe(arguments()))
    one, two = (load_results(tmp_path / name / "results.json")["before"].tasks["planted"] for name in ("out", "two"))
    assert one.to_dict() == two.to_dict()
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2
