"""TOFU's numbers by hand, and against the published evaluation logs of two models."""

import gzip
import itertools
import json
import math

import numpy as np
import pytest

from biasunlearn_trainer.eval.metrics.tofu import (
    EXACT_UP_TO,
    forget_quality,
    ks_distance,
    ks_p_value,
    model_utility,
    probability_scores,
    truth_ratio,
    truth_ratio_score,
    truth_ratio_scores,
)


def test_truth_ratio_by_hand():
    # Wrong answers of probability 1/2 and 1/8 beside a right one of 1/4: mean 5/16 or geometric mean 1/4.
    correct, wrong = np.log([1 / 4]), np.log([[1 / 2, 1 / 8]])
    assert truth_ratio(correct, wrong) == pytest.approx([(5 / 16) / (1 / 4)])
    assert truth_ratio(correct, wrong, mean="geometric") == pytest.approx([1.0])
    # The two agree where all wrong answers are equally likely.
    same = np.full((1, 3), -2.0)
    assert truth_ratio(correct, same) == pytest.approx(truth_ratio(correct, same, mean="geometric"))


def test_truth_ratio_of_impossible_answers():
    # exp(-2000) is 0 in float64; the ratio of exp(-2000) and exp(-2001) is not.
    assert truth_ratio([-2001.0], [[-2000.0, -2000.0]]) == pytest.approx([math.e])


def test_truth_ratio_as_a_score():
    ratios = np.array([0.0, 0.5, 1.0, 4.0])
    assert truth_ratio_scores(ratios, forget=True).tolist() == [0.0, 0.5, 1.0, 0.25]
    assert truth_ratio_scores(ratios, forget=False).tolist() == [1.0, 0.5, 0.0, 0.0]
    metric = truth_ratio_score(ratios, True, "tofu/x")
    assert (metric.value, metric.n, metric.higher_is_better) == (pytest.approx(1.75 / 4), 4, None)
    assert truth_ratio_score(ratios, False, "tofu/x").ideal == 1.0


@pytest.mark.parametrize(
    ("correct", "wrong", "mean", "message"),
    [
        ([-1.0], [[-1.0]], "median", "must be arithmetic or geometric"),
        ([-1.0], [[-1.0], [-2.0]], "arithmetic", r"got \(1,\) and \(2, 1\)"),
        ([1.0], [[-1.0]], "arithmetic", "at most 0"),
        ([math.nan], [[-1.0]], "arithmetic", "at most 0, and numbers"),
    ],
)
def test_what_no_truth_ratio_can_be_made_of(correct, wrong, mean, message):
    with pytest.raises(ValueError, match=message):
        truth_ratio(correct, wrong, mean)


def test_probabilities_by_hand():
    assert probability_scores(np.log([0.25])) == pytest.approx([0.25])
    assert probability_scores(np.log([0.25]), np.log([[0.25, 0.5]])) == pytest.approx([0.25])
    assert probability_scores([-900.0], [[-900.0]]) == pytest.approx([0.5])


def test_model_utility_by_hand():
    # Means 1, 1, 1 | 0.5, 0.5, 0.5 | 0.25, 1, 1: 9 / (3 + 6 + 4 + 2) = 0.6.
    sets = {"a": [[1, 1, 1]] * 4, "b": [[0, 0.5, 1], [1, 0.5, 0]], "c": [[0.25, 1, 1]]}
    metric = model_utility(sets)
    assert metric.value == pytest.approx(0.6) and metric.n == 7
    assert metric.ci95[0] <= 0.6 <= metric.ci95[1] and metric.ci95[0] < metric.ci95[1]
    assert model_utility({"a": [[1, 1, 1]], "b": [[0, 1, 1]]}).value == 0.0
    assert model_utility({"a": [[1, 1, 1]]}).value == 1.0


def test_model_utility_resamples_each_set_by_itself():
    rng = np.random.default_rng(0)
    # Of a set whose items all agree nothing is uncertain; the width comes from the other one.
    fixed, noisy = [[0.5, 0.5, 0.5]] * 30, rng.uniform(0, 1, (30, 3))
    wide, narrow = (model_utility({"a": fixed, "b": part}) for part in (noisy, [[0.5, 0.5, 0.5]] * 30))
    assert narrow.ci95 == pytest.approx((0.5, 0.5)) and wide.ci95[1] - wide.ci95[0] > 0.05


def test_what_has_no_utility():
    with pytest.raises(ValueError, match=r"b: expected \(n, 3\) scores \(rouge, probability, truth_ratio\)"):
        model_utility({"a": [[1, 1, 1]], "b": [[1, 1]]})
    with pytest.raises(ValueError, match="between 0 and 1"):
        model_utility({"a": [[1, 1, 1.5]]})


def test_ks_p_value_counts_what_can_be_counted():
    """All ways to merge 3 and 4 values, by brute force."""
    distances = []
    for places in itertools.combinations(range(7), 3):
        others = [place for place in range(7) if place not in places]
        distances.append(ks_distance(places, others))
    for distance in sorted(set(distances)):
        expected = sum(other >= distance - 1e-9 for other in distances) / len(distances)
        assert ks_p_value(distance, 3, 4) == pytest.approx(expected, abs=1e-15)
    assert ks_p_value(0.0, 3, 4) == 1.0


def test_ks_p_value_of_large_samples_is_the_limit():
    m, n = 1250, 900
    assert m * n > EXACT_UP_TO
    # Beside the exact value of samples just small enough, at the same scaled distance; the limit is a little above.
    small = (1000, 900)
    scaled = 1.2
    exact = ks_p_value(scaled / math.sqrt(900_000 / 1900), *small)
    assert ks_p_value(scaled / math.sqrt(m * n / (m + n)), m, n) == pytest.approx(exact, rel=0.07)
    assert ks_p_value(1e-4, m, n) == 1.0


def test_forget_quality_of_the_same_and_of_others():
    values = np.linspace(0.1, 0.9, 50)
    same = forget_quality(values, values)
    assert same["forget_quality"].value == 1.0 and same["ks_distance"].value == 0.0
    other = forget_quality(values, values + 2)
    # Two of the C(100, 50) merges are so far apart.
    assert other["forget_quality"].value == pytest.approx(2 / math.comb(100, 50), rel=1e-12)
    low, high = other["ks_distance"].ci95
    assert low == pytest.approx(1 - 2 * math.sqrt(math.log(80) / 100)) and high == 1.0
    with pytest.raises(ValueError, match="finite values are needed"):
        forget_quality([], values)


@pytest.fixture(scope="module")
def logs(data_dir):
    names = {"full": "eval_log_llama2-7b_full.json.gz", "retain90": "eval_log_llama2-7b_retain90.json.gz"}
    return {name: json.loads(gzip.decompress((data_dir / "tofu" / file).read_bytes())) for name, file in names.items()}


def column(part, name):
    return np.array(list(part[name].values()))


def forget_ratios(log):
    part = log["eval_log_forget.json"]
    return truth_ratio(-column(part, "avg_paraphrased_loss"), -column(part, "average_perturb_loss"), "geometric")


def test_published_truth_ratios(logs):
    for log in logs.values():
        logged = column(log["eval_log_forget.json"], "truth_ratio")
        assert forget_ratios(log) == pytest.approx(logged, rel=1e-6)  # the logs are float32


def test_published_normalised_probabilities(logs):
    for name in ("eval_real_author_wo_options.json", "eval_real_world_wo_options.json"):
        part = logs["full"][name]
        ours = probability_scores(-column(part, "avg_gt_loss"), -column(part, "average_perturb_loss"))
        assert -np.log(ours) == pytest.approx(column(part, "normalized_gt_loss"), rel=1e-12)


@pytest.mark.parametrize(("model", "expected"), [("full", 0.590674), ("retain90", 0.583407)])
def test_published_model_utility(logs, model, expected):
    """The utilities that scipy 1.17's hmean gives for the nine means of the published logs."""
    sets = {}
    for name, part in logs[model].items():
        if "forget" not in name:
            correct, wrong = -column(part, "avg_gt_loss"), -column(part, "average_perturb_loss")
            ratios = truth_ratio(-column(part, "avg_paraphrased_loss"), wrong)
            probabilities = probability_scores(correct, None if name == "eval_log.json" else wrong)
            sets[name] = np.stack([column(part, "rougeL_recall"), probabilities, truth_ratio_scores(ratios, False)], 1)
    metric = model_utility(sets)
    assert metric.value == pytest.approx(expected, abs=1e-6) and metric.n == 517


def test_published_forget_quality(logs):
    """The statistic and exact p value that scipy 1.17's ks_2samp gives for the published logs."""
    quality = forget_quality(forget_ratios(logs["full"]), forget_ratios(logs["retain90"]))
    assert quality["ks_distance"].value == pytest.approx(0.38)
    assert quality["forget_quality"].value == pytest.approx(1.0966243e-19, rel=1e-6)
    low, high = quality["forget_quality"].ci95
    assert low < 1e-40 and 1e-6 < high < 1e-5
