"""Two machines with and without a common disk decide alike what is read, made anew, and cannot be kept."""

import os
import socket
import subprocess
import sys

import pytest

SCRIPT = """
import biasunlearn_trainer
import logging
import os
import sys
import torch
from pathlib import Path
from accelerate.state import AcceleratorState, GradientState
from biasunlearn_trainer import NPOConfig, NPOTrainer
from biasunlearn_trainer.models import load_model

model, root = sys.argv[1], Path(sys.argv[2])
rank = int(os.environ["RANK"])
words = []


class Listener(logging.Handler):
    def emit(self, record):
        words.append(record.getMessage())


logging.getLogger("biasunlearn_trainer").addHandler(Listener(logging.WARNING))


def rows(name):
    return [{"prompt": f"Who was {name} {i}?", "completion": " The " + "tall " * (i % 3) + "one."} for i in range(7)]


def train(cache):
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    words.clear()
    args = NPOConfig(
        str(root / "out"), max_steps=4, per_device_train_batch_size=2, learning_rate=1e-3, logging_steps=1,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, bf16=False, retain_loss="kl",
        reference="precomputed", reference_cache_dir=str(cache), saliency_mask="fisher",
        saliency_cache_dir=str(cache if cache.name != "sys" else root / "masks"),
    )
    assert args.world_size == 2
    torch.manual_seed(0)
    trainer = NPOTrainer(
        model=load_model(model), args=args, forget_dataset=rows("forget"), retain_dataset=rows("retain")
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, type(trainer.reference["retain"]).__name__, " | ".join(words)


def all_wait():
    torch.distributed.barrier()


def files(cache):
    return sorted(path for path in cache.iterdir())


together = root / "together"
expected, form, said = train(together)
assert form == "StatesReference" and not said, said
assert len(files(together)) == 3, files(together)  # log-probabilities, hidden states, the mask
written = [path.stat().st_mtime_ns for path in files(together)]

own = root / f"machine{rank}"
losses, form, said = train(own)
assert (losses, form, said) == (expected, "StatesReference", ""), (losses, expected, form, said)
assert [path.name for path in files(own)] == [path.name for path in files(together)], files(own)
all_wait()
sizes = [path.stat().st_size for path in files(own)]

# One machine has lost its files, then one has damaged ones: all compute again, and all come out alike.
if rank == 1:
    for path in files(own):
        path.unlink()
losses, form, said = train(own)
assert (losses, form) == (expected, "StatesReference") and not said, (losses, expected, form, said)
all_wait()
if rank == 1:
    for path in files(own):
        data = path.read_bytes()
        path.unlink()
        path.write_bytes(data[:-4])
losses, form, said = train(own)
assert (losses, form) == (expected, "StatesReference"), (losses, expected, form, said)
assert said.count("is not read, it is damaged") == (3 if rank == 1 else 0), said
assert [path.stat().st_size for path in files(own)] == sizes

# One machine has no room: no process keeps hidden states, and each says why.
losses, form, said = train(Path("/sys") if rank == 1 else root / "roomy")
assert form == "ModelReference", form
assert "and 0.0 MiB are free there" in said and "reference='model' is used instead" in said, said
torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), atol=1e-5, rtol=1e-5)
if rank == 0:
    assert not [path for path in (root / "roomy").iterdir() if path.suffix == ".partial"]

losses, form, said = train(together)
assert (losses, form, said) == (expected, "StatesReference", "")
assert [path.stat().st_mtime_ns for path in files(together)] == written
print("all decided alike", flush=True)
all_wait()
os._exit(0)  # on a busy machine a thread of gloo may abort the interpreter's own way out
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/sys is a folder without room for anything")
def test_two_machines_without_a_common_disk_decide_alike(tiny_llama, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=1", "--nnodes=2"]
    launch += ["--master_addr=127.0.0.1", f"--master_port={port}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    machines = [
        subprocess.Popen(
            [*launch, f"--node_rank={number}", str(script), str(tiny_llama), str(tmp_path)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    for machine, words in zip(machines, said, strict=True):
        assert machine.returncode == 0, words[-4000:]
        assert "all decided alike" in words
