"""The benchmark of the losses runs, and says what it is there to say."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "losses.py"


def test_own_gradients_take_half_the_memory():
    words = ["--positions", "256", "--words", "2000", "--rounds", "1"]
    done = subprocess.run([sys.executable, SCRIPT, *words], capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines()[2:]]
    peaks = {(loss, way): float(peak) for loss, way, *_, peak in rows}
    for loss in ("KL", "log-probabilities"):
        assert 0 < peaks[loss, "own gradient, chunks"] <= 0.6 * peaks[loss, "autograd"]
