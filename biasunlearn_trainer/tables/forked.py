"""Starts cells by forking a process that has imported everything: a tenth of a second in place of eight.

Every cell still is a process of its own, with its own session, log and lock. For grids of small runs on a CPU: a
process that has touched a GPU cannot be forked.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import IO

from biasunlearn_trainer.tables.plan import Cell

POLL_SECONDS = 0.1


class ForkError(RuntimeError):
    """Cells cannot be forked on this machine."""


class ForkedProcess:
    """A forked cell.

    Args:
        pid: of the cell, which leads a session of its own.
    """

    def __init__(self, pid: int):
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        """Exit status, None while the cell runs; minus the signal's number where one killed it."""
        if self._status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status

    def interrupt(self) -> None:
        """Asks the cell to stop, as Ctrl-C does."""
        self._signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        """Waits so long for the cell to stop, then kills it with all that it started."""
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C does not wait
            until = time.monotonic() + seconds
            while self.poll() is None and time.monotonic() < until:
                time.sleep(POLL_SECONDS)
        while self.poll() is None:
            self._signal(signal.SIGKILL)
            time.sleep(POLL_SECONDS)

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has not made its session yet, or has just ended
                os.killpg(self.pid, number)


@dataclass(frozen=True)
class ForkLauncher:
    """Starts every cell by a fork of this process.

    Attributes:
        jobs: cells at a time; with more than one they share the cores evenly.
    """

    jobs: int = 1

    def __post_init__(self):
        import torch

        if torch.cuda.is_available():
            raise ForkError("--fork is for runs on a CPU: a process that uses a GPU cannot be forked. Drop --fork.")
        import biasunlearn_trainer.runner  # noqa: F401 - what every cell would import

    def __call__(self, cell: Cell, words: Sequence[str], log: IO[str], lock: int) -> ForkedProcess:
        """Starts a cell; the lock's descriptor is inherited, so that the cell holds it to its end."""
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid:
            return ForkedProcess(pid)
        status = 1
        try:
            status = self._run(words, log)
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)  # nothing of the grid's own way out may run here

    def _run(self, words: Sequence[str], log: IO[str]) -> int:
        import torch

        from biasunlearn_trainer.runner import main

        os.setsid()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for descriptor in (1, 2):
            os.dup2(log.fileno(), descriptor)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115 - for good
        if self.jobs > 1:
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // self.jobs))
        return main(list(words))
