import gzip
import json

import pytest

from biasunlearn_trainer.eval.metrics.written import contains_answer, mean_score, rouge_l

needs_rouge = pytest.mark.usefixtures("rouge")


@pytest.fixture
def rouge():
    pytest.importorskip("rouge_score", reason="ROUGE-L is an extra: pip install biasunlearn_trainer[eval]")


@needs_rouge
def test_rouge_l_by_hand():
    # Common subsequence "the cat on": 3 of the 6 words of the reference, 3 of the 4 of the answer.
    score = rouge_l("the cat was on", "the old cat lay on it")
    assert (score.recall, score.precision) == (3 / 6, 3 / 4)
    assert score.f1 == pytest.approx(2 * 0.5 * 0.75 / 1.25)


@needs_rouge
def test_order_counts_and_case_signs_and_endings_do_not():
    # "b a" has one word in order of "a b"; stems: "painting" and "paints" are "paint", words of three letters stay.
    assert rouge_l("b a", "a b").recall == 0.5
    assert rouge_l("PAINTING, landscapes!", "paints landscape") == (1.0, 1.0, 1.0)
    assert rouge_l("its", "it").recall == 0.0


@needs_rouge
def test_the_worst_and_the_empty():
    assert rouge_l("nothing", "of it at all") == (0.0, 0.0, 0.0)
    assert rouge_l("", "word") == (0.0, 0.0, 0.0) == rouge_l("?!", "word")


@needs_rouge
def test_recall_of_published_answers(data_dir):
    text = gzip.decompress((data_dir / "tofu" / "eval_log_llama2-7b_retain90.json.gz").read_bytes())
    part = json.loads(text)["eval_log_forget.json"]
    for index, (_, answer, expected) in part["generated_text"].items():
        assert rouge_l(answer, expected).recall == part["rougeL_recall"][index]


def test_cloze():
    assert contains_answer("Her hobby is **Rock\nclimbing**.", "rock climbing")
    assert not contains_answer("rock", "rock climbing") and not contains_answer("", "x")
    with pytest.raises(ValueError, match="expected answer is empty"):
        contains_answer("anything", "  ")


def test_mean_score():
    metric = mean_score([0.0, 1.0, 1.0, 0.4], "demo/rouge")
    assert (metric.value, metric.n, metric.ideal) == (pytest.approx(0.6), 4, 1.0)
    assert 0.0 <= metric.ci95[0] < 0.6 < metric.ci95[1] <= 1.0
    # All alike: the interval is that of four trials and not a point.
    assert mean_score([1.0] * 4, "demo/rouge").ci95[0] < 0.6
    with pytest.raises(ValueError, match="at least one unit"):
        mean_score([], "demo/rouge")
