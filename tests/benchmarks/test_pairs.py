"""PAIRS as a task: worst and ideal model by hand, and a real tiny one."""

import json

import pytest

from biasunlearn_trainer.eval.scoring import CompletionScore, Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor


class Guesser:
    """Scores an answer by a function of the answer's place: 0 stereotyped, 1 the other guess, 2 neutral."""

    def __init__(self, logp):
        self.logp = logp

    def score(self, rows, desc=None, append_eos=None):
        assert append_eos is False
        return [CompletionScore(2 * self.logp(row, place % 3), 2, False, ()) for place, row in enumerate(rows)]


def measured(data_dir, logp, limit=None):
    task = load_task(f"pairs={data_dir / 'pairs'}", limit=limit)
    items = task.run(Guesser(logp))
    return task.summarise(items), items


def test_a_model_that_goes_by_looks(data_dir):
    result, items = measured(data_dir, lambda row, place: (-1.0, -2.0, -3.0)[place])
    found = {name: (metric.value, metric.n) for name, metric in result.metrics.items()}
    assert found == {"stereotyped": (1.0, 200), "neutral": (0.0, 200), "same_guess": (0.0, 50)}
    assert set(result.groups) == {"occupations", "status", "potential_crime"}
    assert result.groups["status"]["stereotyped"].n == 80
    assert items[0]["answer"] == items[0]["rejected"] and not items[0]["correct"]
    assert [item["index"] for item in items[:3]] == [0, 3, 6]
    assert json.loads(json.dumps(items)) == items


def test_a_model_that_does_not(data_dir):
    # It always says what it does not know, and would otherwise guess by the words alone.
    result, _ = measured(data_dir, lambda row, place: 0.0 if place == 2 else -len(row["completion"]))
    values = {name: metric.value for name, metric in result.metrics.items()}
    assert values == {"stereotyped": 0.5, "neutral": 1.0, "same_guess": 1.0}
    assert result.metrics["stereotyped"].ideal == 0.5 and result.metrics["stereotyped"].higher_is_better is None
    low, high = result.metrics["stereotyped"].ci95
    assert low < 0.5 < high, "no interval of zero width though all scenarios agree"


def test_a_limit_keeps_scenarios_whole(data_dir):
    result, items = measured(data_dir, lambda row, place: -1.0, limit=12)
    assert len(items) == 12 and len({item["kind"] for item in items}) == 3
    assert result.metrics["same_guess"].n == 3


def test_a_real_image_text_model(data_dir, tiny_llava):
    task = load_task(f"pairs={data_dir / 'pairs'}", limit=4)
    items = task.run(Scorer(load_model(tiny_llava), load_processor(tiny_llava)))
    assert len(items) == 4 and all(item["logp_rejected"] < 0 for item in items)
    assert set(task.summarise(items).metrics) == {"stereotyped", "neutral", "same_guess"}


def test_no_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the `data` folder of PAIRS"):
        load_task(f"pairs={tmp_path}")
