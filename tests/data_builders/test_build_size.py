"""How long a large build takes, and what it holds in memory."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

MAX_BYTES_PER_ROW = 400
"""What a build may hold a row: flags and keys of every row, word pairs of those to report. Measured: 307."""


def _load_generator():
    path = Path(__file__).with_name("many_rows.py")
    spec = importlib.util.spec_from_file_location("many_rows_of_builds", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


many = _load_generator()
# Processor time and not that of the clock, which is of this build alone whatever else the machine does.
MEASURED = """
import json, resource, sys
from biasunlearn_trainer.data_builders.build import main
assert main([sys.argv[1]]) == 0
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "kilobytes": used.ru_maxrss}))
"""


def measured(recipe):
    """A build in a process of its own: its record, seconds of the processor, and kilobytes resident at most."""
    done = subprocess.run([sys.executable, "-c", MEASURED, recipe], capture_output=True, text=True, check=True)
    record = json.loads((recipe.parent / "set/build.json").read_text())["report"]
    return record, json.loads(done.stdout.splitlines()[-1])


def test_the_generated_rows_are_all_accepted(data_dir, tmp_path):
    rows = list(many.many_rows(11_000, data_dir))
    assert len({(row["prompt"], row["completion"]) for row in rows}) == 11_000
    made = many.Counterfactuals().run(rows[::20])
    assert sum(isinstance(row, dict) for row in made) == 2 * len(rows[::20])


@pytest.mark.slow
def test_100_000_rows_in_a_minute_and_in_flat_memory(data_dir, tmp_path):
    """The whole build: counterfactuals, schema, duplicates, near duplicates, leakage, Parquet, card."""
    _, small = measured(many.write(25_000, data_dir, tmp_path / "small"))
    record, large = measured(many.write(100_000, data_dir, tmp_path / "large"))
    assert sum(split["num_rows"] for split in record["splits"].values()) == 200_000
    assert large["cpu"] < 60
    # 75,000 rows more, and as many counterfactuals.
    assert 1024 * (large["kilobytes"] - small["kilobytes"]) < MAX_BYTES_PER_ROW * 150_000
