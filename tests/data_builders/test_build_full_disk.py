"""A disk that fills up while a paraphraser is paid: what was answered stays, and the next build asks for the rest."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("openai", reason="openai is not installed: pip install -e '.[test]' -c constraints.txt")


def _load_server():
    spec = importlib.util.spec_from_file_location("chat_server_full_disk", Path(__file__).with_name("chat_server.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


chat = _load_server()
NUM_ROWS = 60
BUILD = "from biasunlearn_trainer.data_builders.build import main; sys.exit(main(sys.argv[1:]))"
# A limit on the size of files makes the kernel write a part of a line and then refuse.
LIMITED = (
    "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000));" + BUILD
)


def write_recipe(folder, url, out):
    rows = [{"prompt": f"On day {n}, was the nurse late?", "completion": " Not known."} for n in range(NUM_ROWS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "mine",
        "sources": [{"source": "rows", "path": str(folder / "rows.jsonl"), "licence": "MIT"}],
        "stages": [
            {"stage": "rephrase_text", "model": "m", "base_url": url, "concurrency": 2, "api_key_env": "MY_KEY"}
        ],
        "splits": {"forget": {}},
        "output_dir": str(out),
    }
    (folder / "r.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "r.yaml"


def run(recipe, code, key=chat.KEY):
    command = [sys.executable, "-B", "-c", code, str(recipe)]
    environment = {**os.environ, "MY_KEY": key, "OPENAI_LOG": "debug"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


def stored(out):
    (path,) = (out / ".cache").glob("rephrase_text-*.jsonl")
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def check_full_then_roomy(recipe, server, out, full, make_room, while_asking=True):
    assert full.returncode == 1
    assert "Traceback" not in full.stderr
    assert "make room" in full.stderr
    kept = len(stored(out))
    assert 0 < kept <= NUM_ROWS
    assert kept < NUM_ROWS or not while_asking
    asked = server.asked.total()
    make_room()
    done = run(recipe, "import sys;" + BUILD)
    assert done.returncode == 0, done.stderr
    assert server.asked.total() - asked == NUM_ROWS - kept
    assert len(stored(out)) == NUM_ROWS
    # No key in what was written or said, though the client logs all it can.
    written = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert chat.KEY.encode() not in written
    assert chat.KEY not in full.stdout + full.stderr + done.stdout + done.stderr


def test_a_limit_on_files(tmp_path):
    with chat.ChatServer(key=chat.KEY) as server:
        recipe = write_recipe(tmp_path, server.url, tmp_path / "out")
        full = run(recipe, LIMITED)
        check_full_then_roomy(recipe, server, tmp_path / "out", full, lambda: None)


@pytest.mark.parametrize(("size", "while_asking"), [("12k", True), pytest.param("24k", False, marks=pytest.mark.slow)])
def test_a_file_system_without_room(tmp_path, size, while_asking):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("a small file system can be mounted by root alone; the limit on files is tested without")
    try:
        with chat.ChatServer(key=chat.KEY) as server:
            recipe = write_recipe(tmp_path, server.url, disk / "out")
            full = run(recipe, "import sys;" + BUILD)
            room = ["mount", "-o", "remount,size=4m", str(disk)]
            grow = lambda: subprocess.run(room, check=True, capture_output=True)  # noqa: E731
            check_full_then_roomy(recipe, server, disk / "out", full, grow, while_asking)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_wrong_key_is_nowhere(tmp_path):
    wrong = "sk-wrong-9876543210fedcba"
    with chat.ChatServer(key=chat.KEY) as server:
        recipe = write_recipe(tmp_path, server.url, tmp_path / "out")
        done = run(recipe, "import sys;" + BUILD, wrong)
    assert done.returncode == 1
    assert "refused the key in MY_KEY: 401" in done.stderr
    assert "Traceback" not in done.stderr
    assert wrong not in done.stdout + done.stderr
    assert not any(wrong.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
