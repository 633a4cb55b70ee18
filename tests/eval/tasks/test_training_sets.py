"""The training sets as tasks: numbers by hand, what is judged and what is not."""

import json

import pytest

from biasunlearn_trainer.eval.scoring import CompletionScore
from biasunlearn_trainer.eval.tasks import load_task


class Answering:
    """A model that gives the completion of the first row and something else to the others."""

    def score(self, rows, desc=None):
        scores = [(-2.0, 2), (-9.0, 3), (-1.0, 1)]
        return [CompletionScore(*scores[i], i == 0, (0,)) for i in range(len(rows))]

    def generate(self, rows, max_new_tokens):
        return [f"answer to {row['prompt']}" for row in rows]


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "completion": " yes."}) + "\n" for p in ("a", "b", "c")))
    return path


@pytest.mark.parametrize(("name", "directions"), [("retain_set", (False, True)), ("forget_set", (None, None))])
def test_numbers_by_hand(rows, name, directions):
    task = load_task(f"{name}={rows}")
    metrics = task.summarise(task.run(Answering())).metrics
    # (2 / 2 + 9 / 3 + 1 / 1) / 3 nats a token; one row of three reproduced.
    assert metrics["nll"].value == pytest.approx(5 / 3)
    assert metrics["reproduced"].value == pytest.approx(1 / 3)
    assert metrics["nll"].n == 3
    assert (metrics["nll"].higher_is_better, metrics["reproduced"].higher_is_better) == directions


def test_answers_are_generated_where_they_are_not_known(rows):
    items = load_task(f"retain_set={rows}").run(Answering(), answers=True)
    assert [item["answer"] for item in items] == ["yes.", "answer to b", "answer to c"]
    assert [item["answer"] for item in load_task(f"retain_set={rows}").run(Answering())] == ["yes.", None, None]


def test_completion_is_expected_of_a_retain_row_and_biased_in_a_forget_row(rows):
    retain = load_task(f"retain_set={rows}").run(Answering())[0]
    forget = load_task(f"forget_set={rows}").run(Answering())[0]
    assert (retain["expected"], retain["rejected"]) == ("yes.", None)
    assert (forget["expected"], forget["rejected"]) == (None, "yes.")


def test_limit(rows):
    assert len(load_task(f"forget_set={rows}", limit=2).rows) == 2
