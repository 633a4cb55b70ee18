import json

import pytest
from datasets import Dataset, Image, List
from PIL import Image as PILImage

from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.eval.scoring import CompletionScore, Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor


def row(kind: str, completion: str, rejected: str | None = None, bias_type: str | None = "race", **more) -> dict:
    return {
        "prompt": f"{kind}?",
        "completion": completion,
        "rejected": rejected,
        "kind": kind,
        "bias_type": bias_type,
        **more,
    }


ROWS = [
    row("ambiguous", " right a", " biased a"),
    row("ambiguous", " right b", " biased b", "age"),
    row("t_generality", " right c", " biased c"),
    row("v_generality", " right d", " biased d"),
    row("disambiguated", " right e"),
    row("perception", " right f", bias_type=None),
    row("facts", " right g", bias_type=None),
    row("facts", " right h", bias_type=None),
]


@pytest.fixture
def folder(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


class TableScorer:
    """Scores by a table {completion: (log p, first choices)}; greedy are those whose choices are `(1,)`."""

    def __init__(self, **changes):
        self.table = {r["completion"]: (-1.0, (1,)) for r in ROWS}
        self.table |= {r["rejected"]: (-5.0, (2,)) for r in ROWS if r["rejected"]}
        self.table |= {f" {name.replace('_', ' ')}": value for name, value in changes.items()}
        self.asked = []

    def score(self, rows, desc=None, append_eos=None):
        assert append_eos is None, "the scorer knows how the model was trained"
        scores = [(row, *self.table[row["completion"]]) for row in rows]
        return [CompletionScore(logp, 1, choices == (1,), choices) for _, logp, choices in scores]

    def generate(self, rows, max_new_tokens, desc=None):
        self.asked += [row["completion"] for row in rows]
        return [" something else" for _ in rows]


def values(result) -> dict[str, float]:
    return {name: metric.value for name, metric in result.metrics.items()}


def test_an_unbiased_model_is_ideal(folder):
    task = load_task(f"planted={folder}")
    items = task.run(TableScorer())
    result = task.summarise(items, baseline=items)
    assert set(values(result)) == {
        *("ambiguous", "disambiguated", "perception", "facts"),
        *("reliability", "t_generality", "v_generality", "t_locality", "m_locality"),
    }
    assert set(values(result).values()) == {1.0}
    assert all(metric.ideal == 1.0 and metric.higher_is_better for metric in result.metrics.values())
    assert result.metrics["facts"].n == 2
    assert list(result.groups) == ["age", "race"]
    assert result.groups["age"]["ambiguous"].n == 1


def test_a_biased_model_by_hand(folder):
    # It prefers the biased answer on one of two ambiguous questions and on the redrawn picture; on the reworded, a tie.
    scorer = TableScorer(right_a=(-5.0, (7,)), biased_a=(-1.0, (1,)), biased_d=(-0.5, (1,)), biased_c=(-1.0, (3,)))
    task = load_task(f"planted={folder}")
    result = values(task.summarise(task.run(scorer)))
    assert (result["ambiguous"], result["reliability"]) == (0.5, 0.5)
    assert (result["t_generality"], result["v_generality"]) == (0.0, 0.0)
    assert "t_locality" not in result and "m_locality" not in result


def test_locality_compares_first_choices_with_the_model_before(folder):
    task = load_task(f"planted={folder}")
    before = task.run(TableScorer(right_g=(-1.0, (4, 5))))
    # g: wrong before and after in the same way, so unchanged; h: right before, wrong after; f: unchanged.
    after = task.run(TableScorer(right_g=(-3.0, (4, 5)), right_h=(-3.0, (6,))))
    result = values(task.summarise(after, baseline=before))
    assert (result["t_locality"], result["m_locality"], result["facts"]) == (0.5, 1.0, 0.0)


def test_a_kind_that_is_absent_has_no_metric(tmp_path):
    Dataset.from_list([r for r in ROWS if r["kind"] in ("ambiguous", "facts")]).to_parquet(tmp_path / "rows.parquet")
    task = load_task(f"planted={tmp_path}")
    assert set(values(task.summarise(task.run(TableScorer())))) == {"ambiguous", "reliability", "facts"}


def test_records_hold_what_a_case_study_needs(folder):
    task = load_task(f"planted={folder}")
    scorer = TableScorer(right_a=(-5.0, (7,)), biased_a=(-1.0, (1,)), right_e=(-5.0, (8,)))
    first, *_ = items = task.run(scorer, answers=True)
    assert first == {
        "index": 0,
        "kind": "ambiguous",
        "bias_type": "race",
        "prompt": "ambiguous?",
        "expected": "right a",
        "rejected": "biased a",
        "answer": "biased a",
        "correct": False,
        "logp_completion": -5.0,
        "logp_rejected": -1.0,
        "predicted": [7],
    }
    assert [item["answer"] for item in items[1:5]] == ["right b", "right c", "right d", "something else"]
    assert scorer.asked == [" right e"], "answers that the scores tell need no generation"
    assert json.loads(json.dumps(items)) == items
    assert task.run(TableScorer(right_e=(-5.0, (8,))))[4]["answer"] is None


def test_limit_takes_every_kind(folder):
    assert {r["kind"] for r in load_task(f"planted={folder}", limit=6).rows} == {r["kind"] for r in ROWS}


def test_faulty_rows_are_named_together(tmp_path):
    Dataset.from_list([row("ambigous", " a", " b"), row("v_generality", " a"), row("facts", " a")]).to_parquet(
        tmp_path / "rows.parquet"
    )
    with pytest.raises(InvalidDataset) as caught:
        load_task(f"planted={tmp_path}")
    assert "row 1: unknown kind 'ambigous'; did you mean 'ambiguous'?" in str(caught.value)
    assert "row 2: kind 'v_generality' needs the biased answer" in str(caught.value)
    Dataset.from_list([{"prompt": "a", "completion": "b"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InvalidDataset, match="no column `kind`"):
        load_task(f"planted={tmp_path}")


def test_pictures_and_texts_through_a_real_model(tmp_path, tiny_llava):
    pictured = [{**r, "images": [PILImage.new("RGB", (32, 32), (30 * i, 90, 200))]} for i, r in enumerate(ROWS[:6])]
    rows = Dataset.from_list([*pictured, *({**r, "images": []} for r in ROWS[6:])])
    rows.cast_column("images", List(Image())).save_to_disk(tmp_path / "world")
    task = load_task(f"planted={tmp_path / 'world'}")
    assert task.rows[0]["images"][0].getpixel((0, 0)) == (0, 90, 200)
    scorer = Scorer(load_model(tiny_llava), load_processor(tiny_llava), batch_size=4)
    items = task.run(scorer, answers=True)
    assert [item["correct"] for item in items] == [item["answer"] == item["expected"] for item in items]
    assert [len(item["predicted"]) for item in items] == [len(r["completion"]) + 1 for r in ROWS]
    assert values(task.summarise(items, baseline=items))["m_locality"] == 1.0
