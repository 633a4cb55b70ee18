"""What is installed is what is there: packages, public names, no top-level `eval` or `recipes`."""

import configparser
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import biasunlearn_trainer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def folders():
    """Every folder with Python files that belongs in the wheel, by package name."""
    roots = {
        "biasunlearn_trainer": ROOT / "biasunlearn_trainer",
        "biasunlearn_trainer.eval": ROOT / "eval",
        "biasunlearn_trainer.data_builders": ROOT / "data_builders",
    }
    for name, root in roots.items():
        for folder in {path.parent for path in root.rglob("*.py")}:
            yield ".".join([name, *folder.relative_to(root).parts]), folder


def test_the_list_of_packages_is_the_folders(setup_cfg):
    listed = set(setup_cfg["options"]["packages"].split())
    assert listed == {name for name, _ in folders()}
    assert all((folder / "__init__.py").is_file() for _, folder in folders())


def test_extras_and_constraints(setup_cfg):
    extras = {"test", "dev", "vision", "deepspeed", "qlora", "generate", "eval"}
    assert extras <= set(setup_cfg["options.extras_require"])
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text().lower(), re.M))
    assert pinned["torch"] == "2.13.0" and pinned["torchvision"] == "0.28.0"
    needed = [re.split(r"[>=\[ ]", line)[0] for line in setup_cfg["options"]["install_requires"].split("\n") if line]
    assert set(needed) <= set(pinned), "a requirement is not pinned"


def test_public_names_resolve():
    for name in biasunlearn_trainer.__all__:
        assert getattr(biasunlearn_trainer, name) is not None
    assert set(biasunlearn_trainer.__all__) <= set(dir(biasunlearn_trainer))
    with pytest.raises(AttributeError, match="no attribute 'NPOTrainr'"):
        biasunlearn_trainer.NPOTrainr  # noqa: B018


def test_a_built_wheel_holds_our_package_and_nothing_else(tmp_path):
    code = "import setuptools.build_meta as b, sys; print(b.build_wheel(sys.argv[1]))"
    copy = tmp_path / "source"
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for file in filter(None, files):
        if (ROOT / file).is_file():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            (copy / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=copy, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        tops = {name.split("/")[0] for name in wheel.namelist()}
        names = set(wheel.namelist())
    assert {top for top in tops if not top.endswith(".dist-info")} == {"biasunlearn_trainer"}
    assert {"biasunlearn_trainer/eval/run.py", "biasunlearn_trainer/data_builders/schema.py"} <= names
    for pattern in ("templates/*.yaml", "words/*.tsv"):
        files = sorted((ROOT / "data_builders").glob(pattern))
        assert len(files) > 1
        assert {f"biasunlearn_trainer/{path.relative_to(ROOT).as_posix()}" for path in files} <= names
    for metric in ("bbq", "crows_pairs", "stereoset"):
        folder = f"biasunlearn_trainer/eval/evaluate_metrics/{metric}"
        assert {f"{folder}/{file}" for file in (f"{metric}.py", "README.md", "requirements.txt", "app.py")} <= names
