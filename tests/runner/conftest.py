"""`start_run`: runs in processes of their own, to be killed, interrupted and kept short of memory or disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

SERVER = Path(__file__).with_name("run_server.py")


class Run:
    """A run that goes on in another process."""

    def __init__(self, server, pid: int, log: Path, stacks: Path):
        self.server, self.pid, self.log, self.stacks = server, pid, log, stacks
        self.status, self.listens, self.read = None, False, 0

    def poll(self) -> int | None:
        """Exit status, minus the number of a signal; None while it runs."""
        if self.status is None:
            self.status = self.server({"wait": self.pid})
        return self.status

    def wait(self, seconds: float = 180) -> int:
        until = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < until, self.log.read_text()[-3000:]
            time.sleep(0.02)
        return self.status

    def signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def stack(self) -> list[tuple[str, str]]:
        """File and function of every call that it is in, the innermost first; empty where it is over or begins."""
        if not self.listens:
            self.listens = self._answer() is not None
            return []
        self.signal(signal.SIGUSR1)
        while (answer := self._answer()) is None and self.poll() is None:
            time.sleep(0.0005)
        return [tuple(call) for call in answer or []]

    def _answer(self) -> list | None:
        """The next line of its stacks, once it is whole."""
        if not self.stacks.exists():
            return None
        with open(self.stacks) as file:
            file.seek(self.read)
            line = file.readline()
        if not line.endswith("\n"):
            return None
        self.read += len(line)
        return json.loads(line)


@pytest.fixture(scope="session")
def _server():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )

    def ask(order: dict):
        process.stdin.write(json.dumps(order) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.terminate()  # a data loader's worker that lives on holds the pipe, too: to close it would say nothing
    process.wait(timeout=30)


@pytest.fixture
def start_run(_server, tmp_path):
    """`start_run(keys, *words, **limits)` starts a recipe; caches are kept in the test's folder."""
    running, number = [], iter(range(1000))

    def start(keys: dict, *words: str, **limits: int) -> Run:
        name = f"run{next(number)}"
        recipe, log, stacks = (tmp_path / f"{name}.{end}" for end in ("yaml", "log", "stacks"))
        recipe.write_text(yaml.safe_dump(keys))
        environment = {"BIASUNLEARN_CACHE": str(tmp_path / "cache")}
        order = {"words": [str(recipe), *words], "log": str(log), "stacks": str(stacks), "environment": environment}
        running.append(Run(_server, _server(order | {"limits": limits}), log, stacks))
        return running[-1]

    yield start
    for run in running:
        run.signal(signal.SIGKILL)
        run.wait(10)
