"""Starts runs by forking a process that has imported everything: one import for all the runs of a session.

Orders come as lines of JSON on stdin, answers go to stdout: `{"words", "log", "stacks", "limits"}` starts a run and
answers its pid, `{"wait": pid}` answers its exit status or null. A run writes its Python stack to `stacks` on SIGUSR1,
between two steps of the interpreter: what faulthandler does in the middle of one ends the process now and then.
"""

import json
import os
import resource
import signal
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec

import torch

import biasunlearn_trainer.trainers.biasunlearn
import biasunlearn_trainer.trainers.npo  # noqa: F401
from biasunlearn_trainer.runner import main

if find_spec("deepspeed"):
    with redirect_stdout(sys.stderr):  # stdout is for answers
        import deepspeed  # noqa: F401 - accelerate would import it in every run, for a second


def tell_stack(descriptor: int) -> None:
    """From here on every SIGUSR1 adds a line: the calls that the main thread is in, the innermost first."""

    def answer(number, frame) -> None:
        calls = []
        while frame is not None:
            calls.append((os.path.basename(frame.f_code.co_filename), frame.f_code.co_name))
            frame = frame.f_back
        os.write(descriptor, json.dumps(calls).encode() + b"\n")

    signal.signal(signal.SIGUSR1, answer)
    os.write(descriptor, b"[]\n")


def run(order: dict) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    tell_stack(os.open(order["stacks"], os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    os.environ.update(order["environment"])
    for name, extra in order["limits"].items():
        if name == "RLIMIT_AS":
            with open("/proc/self/statm") as file:
                extra += int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(getattr(resource, name), (extra, extra))
    return main(order["words"])


def serve() -> None:
    torch.set_num_threads(1)  # a fork has none of the threads that a pool of its parent had
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        pid = os.fork()
        if not pid:
            status = 70
            try:
                status = run(order)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        print(pid, flush=True)


if __name__ == "__main__":
    serve()
