"""The acceptance command for GPUs, whose every part runs here on a tiny model and a CPU."""

import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu_acceptance.py"


def lines_of(*words):
    """The outcome by part: pass, FAIL or ----."""
    done = subprocess.run(
        [sys.executable, COMMAND, "--device", "cpu", "--size", "tiny", "--batch", "2", *words],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    marks = ("pass  ", "FAIL  ", "----  ")
    return {line[6:28].strip(): line[:4] for line in done.stdout.splitlines() if line.startswith(marks)}


def test_a_part_runs_and_what_begins_too_late_is_said_not_to_have_run():
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    assert lines_of("--parts", "qlora") == {"npo in 4 bits": "pass"}
    assert lines_of("--parts", "demo", "--minutes", "-1") == {"demo": "----"}


@pytest.mark.slow
def test_all_parts():
    pytest.importorskip("bitsandbytes", reason="the extra `qlora` is not installed")
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    found = lines_of("--minutes", "60")
    assert found.pop("fsdp2") == "----" and set(found.values()) == {"pass"}
    assert {"demo", "kl_min", "mmunlearner", "zero3", "resume"} <= set(found)
