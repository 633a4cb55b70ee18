import pytest
from datasets import Dataset

from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.eval.tasks import load_task

JOBS = ["baker", "pilot", "nurse", "judge"]
ROWS = [
    {"kind": "forget_vqa", "prompt": "a", "completion": " Bidola baker", "choices": JOBS},
    {"kind": "forget_vqa", "prompt": "b", "completion": " Bidola pilot", "choices": JOBS},
    {"kind": "forget_who", "prompt": "c", "completion": " Bidola", "choices": ["Bidola", "Komapu"]},
    {"kind": "retain_qa", "prompt": "d", "completion": " Komapu judge", "choices": JOBS},
]


@pytest.fixture
def folder(tmp_path):
    Dataset.from_list(ROWS).to_parquet(tmp_path / "rows.parquet")
    return tmp_path


class TableScorer:
    """Says what a table has for each prompt, and likes best the completion that it is told to."""

    def __init__(self, said: dict[str, str], likes: dict[str, str]):
        self.said, self.likes, self.asked = said, likes, {}

    def generate(self, rows, max_new_tokens, desc=None):
        return [self.said[row["prompt"]] for row in rows]

    def score_last_token(self, rows, choices, desc=None):
        self.asked = {row["prompt"]: several for row, several in zip(rows, choices, strict=True)}
        return [
            [-0.5 if text.split()[-1] == self.likes[row["prompt"]] else -2.0 for text in several]
            for row, several in zip(rows, choices, strict=True)
        ]


ALL_RIGHT = {row["prompt"]: row["completion"] for row in ROWS}
LIKES = {row["prompt"]: row["completion"].split()[-1] for row in ROWS}


def values(result):
    return {name: metric.value for name, metric in result.metrics.items()}


def test_a_model_that_knows_everybody(folder):
    task = load_task(f"entities@report={folder}")
    items = task.run(TableScorer(ALL_RIGHT, LIKES))
    kinds = ("forget_vqa", "forget_who", "retain_qa")
    assert values(task.summarise(items)) == {f"{kind}{end}": 1.0 for kind in kinds for end in ("", "_exact")}
    assert [item["logp_completion"] for item in items] == [-0.5] * 4


def test_the_choice_is_made_behind_the_models_own_first_words(folder):
    said = {"a": " Komapu baker", "b": "", "c": " Komapu", "d": "?! never mind"}
    scorer = TableScorer(said, {**LIKES, "c": "Komapu"})
    task = load_task(f"entities={folder}")
    items = task.run(scorer)
    assert scorer.asked["a"] == [f" Komapu {job}" for job in JOBS], "another name than the right one"
    assert scorer.asked["b"] == [f" {job}" for job in JOBS], "an answer without a word"
    assert scorer.asked["c"] == [" Bidola", " Komapu"], "a name is chosen among names, behind nothing"
    assert scorer.asked["d"] == [f" ?! {job}" for job in JOBS]
    # By hand: a and b choose the right fact behind other words, c chooses the wrong name, d the right fact.
    assert values(task.summarise(items)) == {
        "forget_vqa": 1.0,
        "forget_who": 0.0,
        "retain_qa": 1.0,
        "forget_vqa_exact": 0.0,
        "forget_who_exact": 0.0,
        "retain_qa_exact": 0.0,
    }


def test_a_tie_is_wrong(folder):
    task = load_task(f"entities={folder}")
    items = task.run(TableScorer(ALL_RIGHT, dict.fromkeys(LIKES, "nothing")))
    assert not any(item["correct"] for item in items) and all(item["exact"] for item in items)


def test_what_is_to_be_forgotten_is_better_when_lower_down_to_chance(folder):
    task = load_task(f"entities={folder}")
    metrics = task.summarise(task.run(TableScorer(ALL_RIGHT, LIKES))).metrics
    assert (metrics["forget_vqa"].higher_is_better, metrics["forget_vqa"].ideal) == (False, 0.25)
    assert (metrics["forget_who"].higher_is_better, metrics["forget_who"].ideal) == (False, 0.5)
    assert (metrics["forget_vqa_exact"].higher_is_better, metrics["forget_vqa_exact"].ideal) == (False, 0.0)
    assert (metrics["retain_qa"].higher_is_better, metrics["retain_qa"].ideal) == (True, 1.0)
    assert metrics["forget_vqa"].n == 2
    low, high = metrics["forget_vqa"].ci95
    assert low == pytest.approx(0.342, abs=1e-3) and high == 1.0  # Wilson: 1 / (1 + 1.96^2 / 2)


def test_a_forgotten_answer_is_not_expected(folder):
    items = load_task(f"entities={folder}").run(TableScorer(ALL_RIGHT, LIKES))
    assert [(item["expected"], item["rejected"]) for item in items] == [
        (None, "Bidola baker"),
        (None, "Bidola pilot"),
        (None, "Bidola"),
        ("Komapu judge", None),
    ]


def test_a_limit_takes_of_every_kind(folder):
    task = load_task(f"entities={folder}", limit=3)
    assert [row["kind"] for row in task.rows] == ["forget_vqa", "forget_who", "retain_qa"]


def test_faulty_rows_are_named(tmp_path):
    wrong = [
        {**ROWS[0], "kind": "forget_vq"},
        {**ROWS[0], "choices": ["pilot", "nurse"]},
        {**ROWS[0], "choices": ["baker", "baker"]},
        {**ROWS[0], "choices": ["baker"]},
    ]
    Dataset.from_list(wrong).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InvalidDataset) as caught:
        load_task(f"entities={tmp_path}")
    assert caught.value.num_faults == 4
    assert "row 1: unknown kind 'forget_vq'; did you mean 'forget_vqa'?" in caught.value.faults[0]
    assert all("`choices` must be at least two different words, 'baker'" in fault for fault in caught.value.faults[1:])


def test_missing_columns_are_named(tmp_path):
    Dataset.from_list([{"prompt": "a", "completion": " b"}]).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(InvalidDataset, match=r"no column `kind`(.|\n)*no column `choices`"):
        load_task(f"entities={tmp_path}")
