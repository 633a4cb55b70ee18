"""The benchmark of the losses runs, and says what it is there to say."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "losses.py"


def test_own_gradients_take_the_least_memory():
    words = ["--positions", "256", "--words", "2000", "--rounds", "1"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    peaks = {(loss, way): float(peak) for loss, way, *_, peak in rows}
    for loss in ("KL", "log-probabilities"):
        assert peaks[loss, "own gradient, chunks"] <= peaks[loss, "checkpointed chunks"] < peaks[loss, "autograd"]
