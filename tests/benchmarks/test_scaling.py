"""What a run costs grows with its sets, row by row, and its memory hardly at all."""

import importlib.util
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"
# Row numbers, lengths and bias types in arrays.
BYTES_PER_ROW = 64
MOST_TIME = 1.25  # a sort of ten times the rows takes log(100,000) / log(10,000) as long a row
# What the tokenizer and the allocators come to hold within some 20,000 rows, and no more of later on.
HELD = 16 * 2**20
QUICK = ("fingerprint of a set", "draws of an epoch, by length", "draws of an epoch, half with pictures")


@pytest.fixture(scope="module")
def scaling():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("scaling_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(SCRIPT.parent))


def test_growth_by_hand(scaling):
    """Ten times the rows in twelve times the time; 900 rows more in 9,000 bytes."""
    found = {100: (1.0, 500), 1000: (12.0, 9500)}
    ratio, per_row = scaling.growth([100, 1000], found)
    assert (ratio, per_row) == (pytest.approx(1.2), 10)


def test_peak_is_seen_while_it_lasts(scaling):
    import numpy as np

    with scaling.Peak() as peak:
        held = np.ones(4_000_000)  # 32 MB
        time.sleep(0.2)
        del held
    assert 0.9 * 32e6 < peak.bytes < 1.2 * 32e6


@pytest.mark.parametrize("stage", QUICK)
def test_stages_without_a_model_are_linear(stage, scaling, tmp_path):
    """Something quadratic would take ten times as long a row; on a busy machine a little more is nothing."""
    sizes = (2_000, 20_000)
    ratio, per_row = scaling.growth(sizes, scaling.medians(stage, tmp_path, sizes, rounds=3))
    assert ratio < 2
    assert per_row < BYTES_PER_ROW


@pytest.mark.slow
def test_every_stage_is_linear(scaling, tmp_path):
    sizes, grown = (10_000, 100_000), {}
    for stage in scaling.STAGES:
        grown[stage] = scaling.growth(sizes, scaling.medians(stage, tmp_path, sizes, rounds=3))
    most = BYTES_PER_ROW + HELD / (sizes[1] - sizes[0])
    assert {stage: found for stage, found in grown.items() if found[0] > MOST_TIME or found[1] > most} == {}
