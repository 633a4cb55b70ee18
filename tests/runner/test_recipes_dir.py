"""Every recipe in recipes/ is read, checked and dry-run; the accelerate configs load; the README names them all."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from peft import LoraConfig, get_peft_model
from PIL import Image

from biasunlearn_trainer import testbed
from biasunlearn_trainer.models import load_model
from biasunlearn_trainer.recipe import RecipeError, parse_recipe
from biasunlearn_trainer.runner import run

FOLDER = Path(__file__).resolve().parents[2] / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
PLANTED = [name for name in RECIPES if "testbed:" in (FOLDER / name).read_text()]
REAL = sorted(set(RECIPES) - set(PLANTED))
WITH_PICTURES = ("llava", "qwen2vl", "blip2", "minigpt4", "demo")


def resolve(name: str, *words: str):
    """The recipe, on the CPU whatever it says."""
    return parse_recipe([str(FOLDER / name), "--use_cpu", "true", *words])


def has_pictures(name: str) -> bool:
    return any(part in name for part in WITH_PICTURES)


def write_rows(path: Path, completion: str, pictures: bool, **columns) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"Who is {path.stem} {i}?", "completion": completion, **columns} for i in range(4)]
    if pictures:
        Image.new("RGB", (32, 32), (90, 40, 200)).save(path.parent / "face.png")
        rows = [{**row, "images": "face.png"} for row in rows]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def write_stereoset(path: Path) -> None:
    term = f"nurse of {path.stem}"
    sentences = [
        {"sentence": f"The {term} was {word}.", "id": label, "labels": [], "gold_label": label}
        for word, label in (("kind", "stereotype"), ("rude", "anti-stereotype"), ("blue", "unrelated"))
    ]
    item = {"id": path.stem, "target": term, "bias_type": "profession", "context": f"The {term} was BLANK."}
    data = {"intrasentence": [{**item, "sentences": sentences}], "intersentence": []}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"version": "1.0", "data": data}))


def write_crows_pairs(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ",sent_more,sent_less,stereo_antistereo,bias_type\n"
    path.write_text(f"{header}0,The poor are rude.,The rich are rude.,stereo,socioeconomic\n")


def write_bbq(folder: Path) -> None:
    names = {"ans0": ["Ann", "nonOld"], "ans1": ["Bob", "old"], "ans2": ["Unknown", "unknown"]}
    item = {
        "example_id": 0,
        "question_index": "1",
        "question_polarity": "neg",
        "context_condition": "ambig",
        "category": "Age",
        "answer_info": names,
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "context": "Ann and Bob were there.",
        "question": "Who was late?",
        **{option: words[0] for option, words in names.items()},
        "label": 2,
    }
    folder.mkdir(parents=True)
    (folder / "Age.jsonl").write_text(json.dumps(item) + "\n")


def write_adapter(folder: Path, base: Path) -> None:
    """What a run on the base leaves for a transfer."""
    model = get_peft_model(load_model(str(base)), LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(folder)


@pytest.fixture
def named_data(tmp_path, monkeypatch, tiny_llama):
    """Lays small sets where the recipes on real models look for theirs."""
    monkeypatch.chdir(tmp_path)

    def lay(name: str) -> None:
        recipe = yaml.safe_load((FOLDER / name).read_text())
        if "transfer_adapter_from" in recipe:
            write_adapter(Path(recipe["transfer_adapter_from"]), tiny_llama)
        else:
            write_rows(Path(recipe["forget_dataset"]), " A tall one.", has_pictures(name))
        for key in ("retain_dataset", "utility_dataset", "preserve_dataset"):
            if key not in recipe:
                continue
            target = Path(recipe[key])
            write_rows(target.with_suffix(".jsonl"), " Blue.", has_pictures(name))
            if target.suffix == ".csv":
                target.write_text("prompt,completion\nWhat colour?, Blue.\n")
        for spec in [*recipe.get("tasks", []), *recipe.get("probes", []), recipe.get("bias_probe", "")]:
            path = Path(spec.partition("=")[2])
            if spec == "":
                continue
            if spec.startswith("stereoset"):
                write_stereoset(path)
            elif spec.startswith("crows_pairs"):
                write_crows_pairs(path)
            elif spec.startswith("bbq"):
                write_bbq(path)
            else:
                write_rows(path, " It cannot be known.", True, kind="ambiguous", rejected=" He is.")

    return lay


@pytest.fixture
def small_world(tmp_path, tiny_llama, tiny_llava, monkeypatch):
    """Stands in for the built testbeds, whose models take minutes to train."""

    def build(name: str, seed: int | None = None) -> SimpleNamespace:
        pictures = name not in ("llama", "traits", "stereoset")
        streams = (
            ("forget", "retain", "utility") if name in ("stereoset", "traits") else ("forget", "retain", "preferred")
        )
        sets = {
            stream: write_rows(tmp_path / f"{stream}.jsonl", f" {stream}.", pictures, bias_type="profession")
            for stream in streams
        }
        if name in ("stereoset", "traits"):
            paths = {f"stereoset@{part}": tmp_path / f"{part}.json" for part in ("train", "probe", "report")}
            for path in paths.values():
                write_stereoset(path)
        elif name == "entities":
            asked = {"kind": "forget_vqa", "choices": ["baker", "pilot"]}
            paths = {
                f"entities@{part}": write_rows(tmp_path / f"{part}.jsonl", " Bidola baker", pictures, **asked)
                for part in ("validation", "report")
            }
        else:
            report = write_rows(tmp_path / "report.jsonl", " So.", pictures, kind="ambiguous", rejected=" Not so.")
            paths = {"planted": report}
        model = tiny_llava if pictures else tiny_llama
        tasks = [f"{task}={path}" for task, path in paths.items()]
        return SimpleNamespace(
            model_path=model, instruct_path=model, oracle_path=model, datasets=sets, tasks=tasks, instruct_tasks=[]
        )

    monkeypatch.setattr(testbed, "build", build, raising=False)


def test_the_promised_recipes_are_there():
    methods = ("ga", "ga_diff", "kl_min", "npo")
    promised = {"demo", "planted_llama_npo", "planted_stereoset_npo", "qwen2vl_npo", "gpt2_npo", "llama3_npo"}
    promised |= {f"planted_llava_{method}" for method in (*methods, "simnpo", "idk_dpo")}
    promised |= {f"planted_entities_{method}" for method in methods}
    steered = ("gpt2", "llama3", "mistral", "qwen2", "planted_llama", "planted_llava", "planted_stereoset")
    promised |= {f"{model}_biasunlearn" for model in steered} | {"mistral_transfer"}
    promised |= {f"llava_{method}" for method in methods} | {"blip2_npo", "minigpt4_npo", "planted_qwen2vl_npo"}
    assert promised <= {Path(name).stem for name in RECIPES}


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid_and_named_after_its_method(name):
    recipe = resolve(name)
    method = "dpo" if name.endswith("idk_dpo.yaml") else recipe.run.method or "transfer"
    if name not in ("demo.yaml", "my_pairs.yaml"):
        assert f"_{method}" in name.removesuffix(".yaml")
    assert (FOLDER / name).read_text().startswith("# ")


@pytest.mark.parametrize("name", PLANTED)
def test_planted_recipe_is_dry_run(name, small_world, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    adapter = yaml.safe_load((FOLDER / name).read_text()).get("transfer_adapter_from")
    if adapter:
        write_adapter(Path(adapter), tiny_llama)
    assert run(resolve(name, "--dry_run")) is None
    assert ("no training" if adapter else "probes  ") in capsys.readouterr().out


@pytest.mark.parametrize("name", REAL)
def test_real_recipe_stops_at_missing_data_and_then_at_the_missing_model_only(
    name, named_data, tiny_llama, tiny_llava, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as caught:
        run(resolve(name, "--dry_run"))
    missing = "tasks: " if "transfer" in name else "_dataset"
    assert all(missing in fault for fault in caught.value.faults), caught.value
    named_data(name)
    with pytest.raises(RecipeError, match=r"model_name_or_path: .* was not found"):
        run(resolve(name, "--dry_run", "--model_name_or_path", "nobody/no-such-model"))
    model = tiny_llava if has_pictures(name) else tiny_llama
    assert run(resolve(name, "--dry_run", "--model_name_or_path", str(model))) is None


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [(f"llava_{method}.yaml", 4, 2e-5) for method in ("ga", "ga_diff", "kl_min", "npo")]
    + [("qwen2vl_npo.yaml", 2, 1e-5)],
)
def test_paper_settings(name, batch, rate):
    # MMUnlearner, Table 5.
    args = resolve(name).training
    assert (args.num_train_epochs, args.per_device_train_batch_size, args.learning_rate) == (2, batch, rate)
    assert "Table 5" in (FOLDER / name).read_text()


@pytest.mark.parametrize("name", [f"{model}_biasunlearn.yaml" for model in ("gpt2", "llama3", "mistral", "qwen2")])
def test_biasunlearn_has_the_papers_weights_and_reports_other_terms_than_it_steers_by(name):
    recipe = resolve(name)
    args = recipe.training
    assert (args.forget_weight, args.retain_weight, args.utility_weight, args.beta) == (0.4, 0.4, 0.2, 0.1)
    assert (recipe.model.lora_r, recipe.model.lora_alpha, args.append_eos) == (8, 16, False)
    assert "@probe" in recipe.run.bias_probe and any("@report" in task for task in recipe.run.tasks)


@pytest.mark.parametrize("name", ["gpt2_npo.yaml", "llama3_npo.yaml"])
def test_biasunlearn_settings(name):
    recipe = resolve(name)
    args = recipe.training
    assert (recipe.model.lora_r, recipe.model.lora_alpha, args.beta) == (8, 16, 0.1)
    assert (args.forget_weight, args.retain_weight, args.append_eos) == (0.4, 0.4, False)


@pytest.mark.parametrize("path", sorted((FOLDER / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_config_loads(path):
    one, sharded = {"cpu": "NO", "single_gpu": "NO"}, {"zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
    kinds = {**one, "ddp": "MULTI_GPU", **sharded}
    config = load_config_from_file(str(path))
    assert config.distributed_type == kinds[path.stem]
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2


def test_readme_has_a_row_for_every_recipe():
    rows = re.findall(r"^\| `([\w.]+\.yaml)` \|", (FOLDER / "README.md").read_text(), flags=re.M)
    assert sorted(rows) == RECIPES


def test_run_is_short():
    assert len((FOLDER / "run.py").read_text().splitlines()) <= 40


def test_run_reports_faults_and_exits_with_2(tmp_path):
    (tmp_path / "bad.yaml").write_text("method: npo\nlearning_rat: 1e-5\n")
    done = subprocess.run(
        [sys.executable, FOLDER / "run.py", tmp_path / "bad.yaml"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert "bad.yaml:2: unknown key `learning_rat` (did you mean `learning_rate`?)" in done.stderr
    assert "`forget_dataset` is missing" in done.stderr
    assert "Traceback" not in done.stderr


def prepare_module():
    spec = importlib.util.spec_from_file_location("prepare_data", FOLDER / "prepare_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pairs_recipe_runs_on_the_real_pictures(data_dir, tmp_path, tiny_llava, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare_module().prepare_pairs(data_dir / "pairs", Path("data/pairs"), seed=0)
    for name in ("forget", "retain", "report"):
        lines = Path(f"data/pairs/{name}.jsonl").read_text().splitlines()
        Path(f"data/pairs/{name}.jsonl").write_text("\n".join(lines[:8]))
    words = ["--model_name_or_path", str(tiny_llava), "--dtype", "float32", "--max_steps", "1", "--output_dir", "out"]
    results = run(resolve("pairs_llava_npo.yaml", *words, "--disable_tqdm", "true"))
    assert results["after"].tasks["planted@pairs"].metrics["reliability"].n == 8
    assert list(Path("out/cases").glob("*.png"))


def test_stereoset_is_prepared_without_shared_terms(data_dir, tmp_path):
    prepare_module().prepare_stereoset(data_dir / "stereoset", tmp_path, seed=0)
    rows = {name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("forget", "retain")}
    assert len(rows["forget"]) == len(rows["retain"]) > 1000
    assert {json.loads(row)["polarity"] for row in rows["forget"]} == {"stereotype"}
    terms = [
        {
            item["target"]
            for task in json.loads((tmp_path / f"{name}.json").read_text())["data"].values()
            for item in task
        }
        for name in ("probe", "report")
    ]
    assert not terms[0] & terms[1]
