"""What evaluation saves beside one sentence per forward pass, on the published sets and a trained model."""

import importlib.util
import random
import sys
import time
from pathlib import Path

import pytest
import torch

from biasunlearn_trainer.eval.scoring import Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "evaluation.py"
# Set, largest share of the naive tokens, smallest ratio of processor times; these leave room for a machine that has
# other work. docs/speed.md has what was measured of this tiny model, and of others for which attention weighs less.
BOUNDS = [
    ("stereoset", "stereoset", 0.56, 3.0),
    ("crows_pairs", "crows_pairs", 0.74, 2.5),
    ("bbq", "bbq/data/Sexual_orientation.jsonl.gz", 0.19, 3.0),
]


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("evaluation_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(SCRIPT.parent))  # for the module beside it
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    sys.path.remove(str(SCRIPT.parent))
    return module


def test_best_possible_by_hand(benchmark):
    # 1, 1 2, 1 2 3 and 1 5: four beginnings from which something is predicted.
    assert benchmark.best_possible([[1, 2, 3, 4], [1, 2, 3, 9], [1, 5, 6]]) == 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "share", "faster"), BOUNDS)
def test_tokens_time_and_scores_on_published_sets(name, path, share, faster, benchmark, data_dir, stories_model):
    model, tokenizer = load_model(stories_model).eval(), load_processor(stories_model)
    rows = list(load_task(f"{name}={data_dir / path}").rows)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        scorer = Scorer(model, tokenizer)
        start = time.process_time()
        scores = scorer.score(rows, append_eos=False)
        seconds = time.process_time() - start
        sample = random.Random(0).sample(range(len(rows)), 400)
        start = time.process_time()
        expected = benchmark.naive(model, tokenizer, [rows[i] for i in sample])
        naive_seconds = (time.process_time() - start) * len(rows) / len(sample)
    finally:
        torch.set_num_threads(threads)
    assert [scores[i].logp for i in sample] == pytest.approx(expected, abs=1e-4, rel=0)
    told = sum(len(benchmark.ids_of(tokenizer, row)[0]) for row in rows)
    assert scorer.num_tokens <= share * told
    assert naive_seconds / seconds >= faster
