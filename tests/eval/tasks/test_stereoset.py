import json
import math
import random
import time

import pytest
import torch

from biasunlearn_trainer.data_builders.sources.stereoset import StereoSetItem, write_json
from biasunlearn_trainer.eval.scoring import CompletionScore, Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor


class TableScorer:
    """Scores sentences by a table of mean log2 p, as if each had four tokens."""

    def __init__(self, table: dict[str, float]):
        self.table = table

    def score(self, rows, desc=None, append_eos=None):
        assert append_eos is False
        assert all((row["prompt"] == "") != row["completion"].startswith(" ") for row in rows)
        return [CompletionScore(4 * math.log(2) * self.table[row["completion"].strip()], 4, False, ()) for row in rows]


def item(number: int, target: str, bias_type: str = "race", task: str = "intrasentence") -> StereoSetItem:
    context = f"{target} {number} is BLANK." if task == "intrasentence" else f"I met {target} {number}."
    sentences = (f"{target} {number} is {word}." for word in ("one", "two", "three"))
    return StereoSetItem(f"id{number}", target, bias_type, task, context, *sentences)


@pytest.fixture
def world(tmp_path):
    """Term A (race): 2 items; term B (gender): 1 item between sentences. SS: A 50, B 100. LMS: A 75, B 50."""
    items = [item(0, "A"), item(1, "A"), item(2, "B", "gender", "intersentence")]
    write_json(items, tmp_path / "items.json")
    order = [(-1, -2, -3), (-2, -1, -1.5), (-1, -3, -2)]
    table = {
        getattr(entry, name): score
        for entry, scores in zip(items, order, strict=True)
        for name, score in zip(("stereotype", "anti_stereotype", "unrelated"), scores, strict=True)
    }
    return tmp_path / "items.json", TableScorer(table)


def test_worked_example(world):
    path, scorer = world
    task = load_task(f"stereoset@x={path}")
    items = task.run(scorer)
    result = task.summarise(items)
    overall = {name: (metric.value, metric.n) for name, metric in result.metrics.items()}
    # ICAT = 62.5 * min(75, 25) / 50
    assert overall == {"ss": (75.0, 3), "lms": (62.5, 3), "icat": (31.25, 3)}
    groups = {group: metrics["ss"].value for group, metrics in result.groups.items()}
    assert groups == {"gender": 100.0, "intersentence": 100.0, "intrasentence": 50.0, "race": 50.0}
    assert [i["score_stereotype"] for i in items] == pytest.approx([-1, -2, -1])
    assert [task.rows[i["index"]]["completion"].strip() for i in items] == [i["stereotype"] for i in items]
    assert json.loads(json.dumps(items)) == items


def test_summary_does_not_depend_on_the_order_of_items(world):
    path, scorer = world
    task = load_task(f"stereoset={path}")
    items = task.run(scorer)
    assert task.summarise(items[::-1]).to_dict() == task.summarise(items).to_dict()


def test_limit_takes_every_part_and_bias_type(data_dir):
    task = load_task("stereoset", data_dir, limit=16)
    assert len(task.rows) == 48
    kinds = {(row["bias_type"], row["prompt"] == "") for row in task.rows}
    assert len(kinds) == 8


def full_logits_score(model, tokenizer, context: str, sentence: str) -> float:
    """Mean log2 p of a sentence: one at a time, full logits, the first token after BOS or after the context."""
    start = len(tokenizer(context)["input_ids"])
    ids = tokenizer(f"{context} {sentence}" if context else sentence)["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    logps = [float(logits[t - 1].log_softmax(-1)[ids[t]]) for t in range(start, len(ids))]
    return sum(logps) / len(logps) / math.log(2)


def largest_deviation(model, tokenizer, items) -> float:
    return max(
        abs(
            record[f"score_{name}"]
            - full_logits_score(
                model, tokenizer, record["context"] if record["kind"] == "intersentence" else "", record[name]
            )
        )
        for record in items
        for name in ("stereotype", "anti_stereotype", "unrelated")
    )


def test_batched_scores_equal_one_sentence_at_a_time(data_dir, stories_model):
    model, tokenizer = load_model(stories_model).eval(), load_processor(stories_model)
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    items = load_task("stereoset", data_dir, limit=80).run(Scorer(model, tokenizer, batch_size=64))
    assert largest_deviation(model, tokenizer, items) < 1e-4


def test_result_does_not_depend_on_batch_size_or_order(data_dir, stories_model):
    scorers = [Scorer(load_model(stories_model), load_processor(stories_model), batch_size=size) for size in (5, 64)]
    task = load_task("stereoset", data_dir, limit=60)
    small, large = (task.run(scorer) for scorer in scorers)
    for name in ("stereotype", "anti_stereotype", "unrelated"):
        assert [i[f"score_{name}"] for i in small] == pytest.approx([i[f"score_{name}"] for i in large], abs=1e-4)
    random.Random(0).shuffle(small)
    assert task.summarise(small).to_dict() == task.summarise(large).to_dict()


@pytest.mark.slow
def test_the_whole_intrasentence_set_in_ten_seconds(data_dir, stories_model):
    model, tokenizer = load_model(stories_model), load_processor(stories_model)
    task = load_task(f"stereoset={data_dir / 'stereoset' / 'intrasentence_stereo_set.csv'}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # Processor time of one thread: at most what the clock shows on two free cores, whatever else the machine is doing.
    start = time.process_time()
    items = task.run(Scorer(model, tokenizer))
    seconds = time.process_time() - start
    torch.set_num_threads(threads)
    assert len(items) == 2106
    assert seconds < 10
    assert largest_deviation(model, tokenizer, items) < 1e-4
