"""The debiasing benchmark as tasks: worst and ideal model by hand, and a real tiny one."""

import json

import pytest
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as Picture

from biasunlearn_trainer.data_builders.schema import InvalidDataset
from biasunlearn_trainer.eval.scoring import CompletionScore, Scorer
from biasunlearn_trainer.eval.tasks import load_task
from biasunlearn_trainer.models import load_model, load_processor


def row(kind, number, task="ic", bias_type=None, pictured=True, **more):
    is_pair = bias_type is not None
    return {
        "prompt": f"{kind} {number}:",
        "completion": f" fair {number}",
        "rejected": f" biased {number}" if is_pair else None,
        "images": ["picture.png"] if pictured else [],
        "kind": kind,
        "task": task,
        "bias_type": bias_type,
        "polarity": "anti_stereotype" if is_pair else "unrelated",
        "source": "made_up",
        "source_id": str(number),
        **more,
    }


ROWS = [
    row("reliability", 0, bias_type="race"),
    row("reliability", 1, bias_type="race"),
    row("reliability", 2, bias_type="age"),
    row("t_generality", 0, bias_type="race"),
    row("v_generality", 0, bias_type="race"),
    row("t_locality", 0, "both", pictured=False),
    row("m_locality", 1, "both"),
    row("reliability", 7, "vqa", bias_type="gender"),
    {**row("reliability", 0, bias_type="race"), "polarity": "stereotype", "rejected": None, "completion": " biased 0"},
]


@pytest.fixture
def built(tmp_path):
    """The folder of a built set with its report split."""
    Picture.new("RGB", (32, 32), (9, 99, 200)).save(tmp_path / "picture.png")
    rows = [{**r, "images": [str(tmp_path / i) for i in r["images"]]} for r in ROWS]
    names = ("prompt", "completion", "rejected", "kind", "task", "bias_type", "polarity", "source", "source_id")
    features = Features({**{name: Value("string") for name in names}, "images": List(Image())})
    (tmp_path / "data").mkdir()
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data" / "ic_report.parquet")
    return tmp_path


class Made:
    """Prefers the biased sentence of some items; says the words `top` at every other row."""

    def __init__(self, biased=(), top=((1, 2), (-0.1, -3.0))):
        self.biased, self.top = set(biased), top

    def score(self, rows, desc=None, append_eos=None):
        assert append_eos is False
        logps = []
        for asked in rows:
            assert all(hasattr(image, "size") for image in asked["images"])
            word, number = asked["completion"].split()
            likely = (word == "biased") == (int(number) in self.biased)
            logps.append(-1.0 if likely else -2.0)
        return [CompletionScore(logp, 1, False, ()) for logp in logps]

    def top_choices(self, rows, k, desc=None, append_eos=None):
        return [[self.top] for _ in rows]


def values(metrics):
    return {name: (metric.value, metric.n) for name, metric in metrics.items()}


def test_numbers_by_hand(built):
    task = load_task(f"debias_ic={built}")
    before, after = task.run(Made(biased=(0, 1, 2))), task.run(Made(biased=(1,), top=((2, 1), (-0.1, -3.0))))
    assert json.loads(json.dumps(after)) == after
    result = task.summarise(before)
    assert values(result.metrics) == {"reliability": (0.0, 3), "t_generality": (0.0, 1), "v_generality": (0.0, 1)}
    result = task.summarise(after, before)
    found = values(result.metrics)
    assert found["reliability"] == (pytest.approx(2 / 3), 3)
    assert found["t_generality"] == found["v_generality"] == (1.0, 1)
    # The two likeliest words changed places: all of the top-k set is left, and none of its order.
    for kind in ("t_locality", "m_locality"):
        assert found[kind] == found[f"{kind}_topk_positional"] == (0.0, 1)
        assert found[f"{kind}_topk_overlap"] == (1.0, 1)
    assert {name: values(metrics) for name, metrics in result.groups.items()} == {
        "age": {"reliability": (1.0, 1)},
        "race": {"reliability": (0.5, 2), "t_generality": (1.0, 1), "v_generality": (1.0, 1)},
    }
    assert after[1]["answer"] == "biased 1" and not after[1]["correct"]


def test_an_unchanged_model_has_full_locality(built):
    task = load_task(f"debias_ic={built / 'data' / 'ic_report.parquet'}")
    items = task.run(Made())
    metrics = task.summarise(items, items).metrics
    assert {name: metric.value for name, metric in metrics.items() if name.endswith("_kl")} == {
        "t_locality_kl": 0.0,
        "m_locality_kl": 0.0,
    }
    assert all(metric.value == 1.0 for name, metric in metrics.items() if not name.endswith("_kl"))
    assert all(metric.ci95[0] < 1.0 for name, metric in metrics.items() if not name.endswith("_kl"))


def test_a_tie_is_no_success(built):
    task = load_task(f"debias_ic={built}")
    scorer = Made()
    scorer.score = lambda rows, **_: [CompletionScore(-1.0, 1, False, ()) for _ in rows]
    assert task.summarise(task.run(scorer)).metrics["reliability"].value == 0.0


def test_each_task_has_its_own_rows(built):
    (built / "data" / "ic_report.parquet").rename(built / "data" / "both.parquet")
    task = load_task(f"debias_vqa={built / 'data' / 'both.parquet'}")
    items = task.run(Made())
    assert [item["kind"] for item in items] == ["t_locality", "m_locality", "reliability"]
    assert items[2]["bias_type"] == "gender"


def test_a_limit_takes_every_kind(built):
    task = load_task(f"debias_ic={built}", limit=6)
    assert len(task.rows) == 6 and {r["kind"] for r in task.rows} == {r["kind"] for r in ROWS}


def test_a_real_image_text_model(built, tiny_llava):
    model = load_model(tiny_llava)
    scorer = Scorer(model, load_processor(tiny_llava), batch_size=2)
    task = load_task(f"debias_ic={built}")
    before = task.run(scorer)
    assert task.summarise(before, before).metrics["t_locality"].value == 1.0
    # The likeliest words of `top_choices` are those that `score` calls the first choices, and their log p is the same.
    rows = [task.rows[i] for i in range(len(task.rows)) if task.rows[i]["kind"].endswith("locality")]
    choices = scorer.top_choices(rows, 300, append_eos=False)
    for tokens, score in zip(choices, scorer.score(rows, append_eos=False), strict=True):
        assert tuple(ids[0] for ids, _ in tokens) == score.predicted
        vocabulary = model.config.get_text_config().vocab_size
        assert all(len(ids) == vocabulary and sorted(ids) == list(range(vocabulary)) for ids, _ in tokens)
    # Another model says something else: the localities fall, and the divergence rises.
    model.lm_head.weight.data.add_(0.5 * model.lm_head.weight.data.flip(0))
    changed = task.summarise(task.run(scorer), before).metrics
    assert changed["m_locality_topk_overlap"].value < 1.0 and changed["m_locality_kl"].value > 0


def test_a_set_without_the_split(built):
    with pytest.raises(FileNotFoundError, match="has no split vqa_report; splits there: ic_report"):
        load_task(f"debias_vqa={built}")


def test_faults_are_named(built):
    file = built / "data" / "ic_report.parquet"
    with pytest.raises(InvalidDataset, match="no rows of the task 'ic'"):
        Dataset.from_list([{**ROWS[0], "images": [], "task": "vqa"}]).remove_columns("images").to_parquet(file)
        load_task(f"debias_ic={built}")
    rows = [{**ROWS[0], "kind": "reliablity", "images": None}, {**ROWS[1], "rejected": None, "images": None}]
    Dataset.from_list(rows).remove_columns("images").to_parquet(file)
    with pytest.raises(InvalidDataset) as err:
        load_task(f"debias_ic={built}")
    assert "did you mean 'reliability'?" in str(err.value) and "needs the biased sentence" in str(err.value)
