"""Starts runs by forking a process that has imported everything: one import for all the runs of a session.

Orders come as lines of JSON on stdin, answers go to stdout: `{"words", "log", "stacks", "limits"}` starts a run and
answers its pid, `{"wait": pid}` answers its exit status or null. A run writes its Python stack to `stacks` on SIGUSR1.
"""

import faulthandler
import json
import os
import resource
import signal
import sys

import torch

import biasunlearn_trainer.trainers.biasunlearn
import biasunlearn_trainer.trainers.npo  # noqa: F401
from biasunlearn_trainer.runner import main


def run(order: dict) -> int:
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    stacks = open(order["stacks"], "a", buffering=1)  # noqa: SIM115 - for good
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=False)
    stacks.write("ready\n")
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
