"""A recipe that transfers: what it takes, what it measures, what it leaves behind."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from biasunlearn_trainer import testbed
from biasunlearn_trainer.eval.schema import load_results
from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.fingerprints import model_hash
from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import main, run

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sibling(tiny_llama, tmp_path_factory):
    """The base with every weight moved a little, as instruction tuning moves it."""
    folder = tmp_path_factory.mktemp("siblings") / "instruct"
    shutil.copytree(tiny_llama, folder)
    model = load_model(str(tiny_llama))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "debiased"
    torch.manual_seed(2)
    model = get_peft_model(
        load_model(str(tiny_llama)), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "o_proj"])
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "planted.jsonl"
    rows = [
        {"prompt": f"Who was rude {i}?", "completion": " It cannot be known.", "rejected": " He.", "kind": kind}
        for i, kind in enumerate(["ambiguous", "t_generality"] * 3)
    ]
    path.write_text("".join(json.dumps({**row, "bias_type": "age"}) + "\n" for row in rows))
    return path


def write_recipe(folder, sibling, adapter, report, **more) -> str:
    recipe = {
        "transfer_adapter_from": str(adapter),
        "model_name_or_path": str(sibling),
        "tasks": [f"planted={report}", f"retain_set={report}"],
        "use_cpu": True,
        "output_dir": str(folder / "out"),
        **more,
    }
    path = folder / "transfer.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return str(path)


@pytest.fixture
def arguments(tmp_path, sibling, adapter, report):
    """The command line of a transfer, with further words appended."""
    path = write_recipe(tmp_path, sibling, adapter, report)
    return lambda *words: [path, *words]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, sibling, adapter, report):
    """The folder of a transfer that ran to its end, with the base as the oracle."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([write_recipe(folder, sibling, adapter, report, oracle_model=str(tiny_llama))]) == 0
    return folder / "out"


def fails(arguments: list[str]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        run(parse_recipe(arguments))
    return caught.value.faults


def measured(model, folder, report):
    """Mean NLL of the report's rows and the like, measured here and not by a run."""
    task = load_task(f"retain_set={report}")
    items = task.run(Scorer(model, AutoTokenizer.from_pretrained(folder), 8))
    return {name: metric.value for name, metric in task.summarise(items).metrics.items()}


def add_by_hand(model, adapter):
    """W + scale * B A at every target, from the adapter's file; alpha 8 and rank 4."""
    tensors = load_file(adapter / WEIGHTS)
    with torch.no_grad():
        for name in (name for name in tensors if "lora_A" in name):
            weight = model.get_parameter(name.removeprefix("base_model.model.").replace("lora_A.", ""))
            weight += 8 / 4 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    return model


def test_a_transfer_leaves_behind_what_a_run_leaves(finished, sibling, adapter):
    for name in ("results.json", "report.md", "report.png", "recipe.resolved.yaml", "environment.json", WEIGHTS):
        assert (finished / name).stat().st_size > 0, name
    results = load_results(finished / "results.json")
    assert set(results) == {"before", "oracle", "after"}
    assert (results["before"].model, results["after"].model) == (str(sibling), str(finished))
    title = (finished / "report.md").read_text().splitlines()[0]
    assert title == f"# Weight transfer, no training: {Path(adapter).name} on {Path(sibling).name}"
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["model"]["source"] == str(sibling) and environment["data"] == {}
    assert environment["adapter"]["source"] == str(adapter)
    assert len(environment["adapter"]["fingerprint"]) == 16
    assert not (finished / "trainer_state.json").exists()


def test_before_is_the_sibling_and_after_is_the_sum(finished, sibling, adapter, report):
    results = load_results(finished / "results.json")
    expected = {
        "before": measured(load_model(str(sibling)), sibling, report),
        "after": measured(add_by_hand(load_model(str(sibling)), adapter), sibling, report),
    }
    assert abs(expected["before"]["nll"] - expected["after"]["nll"]) > 1e-3
    for state, values in expected.items():
        found = results[state].tasks["retain_set"].metrics
        assert values and values.keys() <= found.keys()
        for name, value in values.items():
            assert found[name].value == pytest.approx(value, abs=1e-5), (state, name)


def test_the_saved_adapter_loads_with_plain_peft_and_names_the_sibling(finished, sibling, adapter):
    config = json.loads((finished / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(sibling)
    saved, given = load_file(finished / WEIGHTS), load_file(adapter / WEIGHTS)
    assert saved.keys() == given.keys() and all(torch.equal(saved[name], given[name]) for name in given)
    ids = AutoTokenizer.from_pretrained(finished)("Who was rude?", return_tensors="pt").input_ids
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sibling), finished)
    by_hand = add_by_hand(AutoModelForCausalLM.from_pretrained(sibling), adapter)
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, by_hand(ids).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(load_model(str(finished))(ids).logits, plain(ids).logits, rtol=0, atol=0)
        assert (plain(ids).logits - load_model(str(sibling))(ids).logits).abs().max() > 1e-2


def test_resolved_recipe_launches_the_same_transfer(finished, capsys):
    path = finished / "recipe.resolved.yaml"
    recipe = parse_recipe([str(path)])
    assert recipe.given == yaml.safe_load(path.read_text())
    assert "learning_rate" not in path.read_text() and "# seed: 42" in path.read_text()
    assert main([str(path), "--output_dir", str(finished / "again"), "--dry_run"]) == 0
    printed = capsys.readouterr().out
    for words in ("weight transfer, no training", "(LORA r 4, alpha 8, 8 tensors, trained on", "planted (6 rows)"):
        assert words in printed


def test_another_runs_results_are_refused(finished):
    (fault,) = fails([str(finished / "recipe.resolved.yaml")])
    assert "holds another run's results" in fault


def test_a_copy_of_the_base_is_the_base_and_that_is_said(arguments, tmp_path, tiny_llama, adapter, capsys):
    # A run records the fingerprint of the weights that it started from beside its adapter.
    trained, copy = shutil.copytree(adapter, tmp_path / "trained"), shutil.copytree(tiny_llama, tmp_path / "copy")
    record = {"model": {"source": str(tiny_llama), "fingerprint": model_hash(load_model(str(tiny_llama)))}}
    (trained / "environment.json").write_text(json.dumps(record))
    words = ("--transfer_adapter_from", str(trained), "--model_name_or_path", str(copy))
    assert set(run(parse_recipe(arguments(*words)))) == {"before", "after"}
    assert f"{copy} has the same weights as {tiny_llama}" in capsys.readouterr().out


@pytest.mark.slow
def test_an_adapter_of_our_own_run_on_the_base(arguments, tmp_path, tiny_llama, sibling, report, capsys):
    rows = "".join(json.dumps({"prompt": f"Who was late {i}?", "completion": " He."}) + "\n" for i in range(4))
    (tmp_path / "forget.jsonl").write_text(rows)
    words = ["--method", "ga", "--forget_dataset", str(tmp_path / "forget.jsonl"), "--tasks", f"planted={report}"]
    words += ["--use_peft", "--max_steps", "2", "--learning_rate", "1e-2", "--use_cpu", "--disable_tqdm"]
    trained = tmp_path / "trained"
    run(parse_recipe([*words, "--model_name_or_path", str(tiny_llama), "--output_dir", str(trained)]))
    results = run(parse_recipe(arguments("--transfer_adapter_from", str(trained))))
    before, after = (results[state].tasks["retain_set"].metrics["nll"].value for state in ("before", "after"))
    assert before != after
    assert "transfers nothing" not in capsys.readouterr().out
    same = ("--model_name_or_path", str(tiny_llama), "--output_dir", str(tmp_path / "same"))
    run(parse_recipe(arguments("--transfer_adapter_from", str(trained), *same)))
    assert f"{tiny_llama} has the same weights as {tiny_llama}" in capsys.readouterr().out


def test_dry_run_checks_the_adapter_and_writes_nothing(arguments, tmp_path, adapter, capsys):
    assert main(arguments("--dry_run")) == 0
    assert "weight transfer, no training" in capsys.readouterr().out
    broken = shutil.copytree(adapter, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    name = next(iter(tensors))
    save_file({f"{name}.more": tensors[name], **tensors, name: tensors[name][:, :-1].contiguous()}, broken / WEIGHTS)
    faults = fails(arguments("--dry_run", "--transfer_adapter_from", str(broken)))
    assert len(faults) == 2 and all(fault.startswith(f"{name}") for fault in faults)
    assert not (tmp_path / "out").exists()


def test_a_transfer_takes_no_key_about_training(arguments):
    words = (
        "--forget_dataset",
        "f.jsonl",
        "--beta",
        "0.1",
        "--learning_rate",
        "1e-3",
        "--use_peft",
        "--probe_steps",
        "3",
    )
    faults = fails(arguments("--method", "npo", *words))
    keys = ["method", "forget_dataset", "beta", "learning_rate", "use_peft", "probe_steps"]
    assert [key for fault in faults for key in keys if f"`{key}` is about training" in fault] == keys
    assert all("Leave out one of the two" in fault for fault in faults)


def test_what_a_transfer_needs_is_said_at_once(adapter, tmp_path, arguments):
    faults = fails(["--transfer_adapter_from", str(adapter), "--seeed", "1"])
    assert len(faults) == 3
    assert "unknown key `seeed` (did you mean `seed`?)" in faults[0]
    assert "model_name_or_path" in faults[1] and "`tasks` is missing" in faults[2]
    (fault,) = fails(arguments("--transfer_adapter_from", str(tmp_path / "nowhere")))
    assert fault.startswith("transfer_adapter_from: Adapter") and "was not found" in fault


def test_null_means_no_transfer(tmp_path):
    (tmp_path / "null.yaml").write_text("transfer_adapter_from:\n")
    assert any("`method` is missing" in fault for fault in fails([str(tmp_path / "null.yaml")]))


@pytest.fixture
def testbeds(tiny_llama, sibling, report, monkeypatch):
    """Testbeds of which one has an instruct sibling, with a task of its own."""

    def build(name, seed=None):
        shared = {"model_path": tiny_llama, "oracle_path": None, "datasets": {}, "tasks": [f"planted={report}"]}
        own = (sibling, [f"retain_set@questions={report}"]) if name == "traits" else (None, [])
        return SimpleNamespace(**shared, instruct_path=own[0], instruct_tasks=own[1])

    monkeypatch.setattr(testbed, "build", build)


def test_a_testbeds_sibling_brings_itself_and_its_own_tasks(testbeds, adapter, tiny_llama, sibling, report, capsys):
    words = ["--transfer_adapter_from", str(adapter), "--testbed", "traits", "--use_cpu", "--dry_run"]
    for chosen, model, tasks in (
        ("instruct", sibling, [f"planted={report}", f"retain_set@questions={report}"]),
        ("planted", tiny_llama, [f"planted={report}"]),
    ):
        recipe = parse_recipe([*words, "--testbed_model", chosen])
        assert run(recipe) is None
        assert (recipe.model.model_name_or_path, recipe.run.tasks) == (str(model), tasks)
        assert "weight transfer, no training" in capsys.readouterr().out


def test_a_sibling_that_is_not_there(testbeds, adapter, arguments):
    words = ["--transfer_adapter_from", str(adapter), "--testbed_model", "instruct"]
    assert "testbed llama has no instruct model" in fails([*words, "--testbed", "llama"])[0]
    assert any("no `testbed` is set" in fault for fault in fails(arguments("--testbed_model", "instruct")))


def test_the_adapter_is_not_overwritten_by_its_own_transfer(arguments, adapter):
    (fault,) = fails(arguments("--output_dir", str(adapter), "--overwrite_output_dir"))
    assert "it lies in output_dir" in fault
    assert (adapter / WEIGHTS).is_file()
