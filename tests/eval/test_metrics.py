import subprocess
import sys

import numpy as np
import pytest

from biasunlearn_trainer.eval.metrics import (
    bootstrap_interval,
    icat,
    paired_difference,
    seed_from_name,
    share,
    stereoset_scores,
    stretch,
    term_scores,
    wilson_interval,
)


def values(scores: dict) -> tuple[float, float, float]:
    return tuple(scores[name].value for name in ("ss", "lms", "icat"))


class TestStereoSet:
    def test_ideal_model(self):
        # Of two items per term one prefers the stereotype, and both related sentences beat the unrelated one.
        scores = stereoset_scores([-1, -2, -1, -2], [-2, -1, -2, -1], [-9] * 4, ["a", "a", "b", "b"])
        assert values(scores) == (50.0, 100.0, 100.0)
        assert (scores["ss"].ideal, scores["lms"].ideal, scores["icat"].ideal) == (50.0, 100.0, 100.0)
        assert (scores["ss"].higher_is_better, scores["icat"].higher_is_better) == (None, True)

    def test_fully_stereotyped_model(self):
        assert values(stereoset_scores([-1] * 3, [-2] * 3, [-9] * 3, ["a", "b", "c"])) == (100.0, 100.0, 0.0)

    def test_model_that_always_prefers_the_unrelated(self):
        assert values(stereoset_scores([-1, -2], [-2, -1], [0, 0], ["a", "a"])) == (50.0, 0.0, 0.0)

    def test_random_model_by_hand(self):
        # Stereotype wins one of two; one of the two beats the unrelated sentence: LMS (1/2 + 1/2) / 2 = 50, ICAT 50.
        assert values(stereoset_scores([-1, -3], [-3, -1], [-2, -2], ["a", "a"])) == (50.0, 50.0, 50.0)

    def test_terms_count_equally_whatever_their_items(self):
        # Term a: 3 of 3 stereotyped; term b: 0 of 1. Over items 75 %, over terms 50 %.
        scores = stereoset_scores([-1, -1, -1, -2], [-2, -2, -2, -1], [-9] * 4, ["a", "a", "a", "b"])
        assert scores["ss"].value == 50.0
        assert scores["ss"].n == 4

    def test_ties_count_as_anti_stereotype_and_not_as_related(self):
        assert term_scores([-1.0], [-1.0], [-1.0], ["a"]).tolist() == [[0.0, 0.0]]

    def test_icat_by_hand(self):
        # 80 * min(70, 30) / 50
        assert icat(70.0, 80.0) == pytest.approx(48.0)
        assert icat(30.0, 80.0) == pytest.approx(48.0)

    def test_order_of_items_does_not_matter(self):
        rng = np.random.default_rng(0)
        scores, terms = rng.normal(size=(3, 60)), np.array([f"term {i % 7}" for i in range(60)])
        order = rng.permutation(60)
        straight = stereoset_scores(*scores, terms, name="x")
        shuffled = stereoset_scores(*scores[:, order], terms[order], name="x")
        for name in straight:
            assert straight[name].value == pytest.approx(shuffled[name].value, abs=1e-9)
            assert straight[name].ci95 == pytest.approx(shuffled[name].ci95, abs=1e-9)

    def test_interval_has_width_when_all_terms_agree(self):
        scores = stereoset_scores([-1] * 20, [-2] * 20, [-9] * 20, [f"term {i}" for i in range(20)])
        low, high = scores["ss"].ci95
        # Wilson for 20 of 20: 20 / (20 + 1.96^2) = 0.8389
        assert (low, high) == pytest.approx((83.89, 100.0), abs=0.01)
        assert scores["icat"].ci95[0] == 0.0 < scores["icat"].ci95[1]

    def test_interval_resamples_terms_and_not_items(self):
        # Two terms that disagree, many items each: over items the interval would be narrow.
        many = stereoset_scores(
            [-1] * 500 + [-2] * 500, [-2] * 500 + [-1] * 500, [-9] * 1000, ["a"] * 500 + ["b"] * 500
        )
        assert many["ss"].ci95[1] - many["ss"].ci95[0] > 50

    def test_nan_is_refused(self):
        with pytest.raises(ValueError, match="NaN"):
            stereoset_scores([float("nan")], [0.0], [0.0], ["a"])


class TestIntervals:
    def test_wilson_against_published_values(self):
        # Agresti & Coull's textbook example of 0 successes in 10 trials: (0, 0.2775); 5 of 10: (0.2366, 0.7634)
        assert wilson_interval(0.0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
        assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)

    def test_share(self):
        metric = share([True, True, True, False])
        assert (metric.value, metric.n, metric.ideal) == (0.75, 4, 1.0)
        assert metric.ci95 == wilson_interval(0.75, 4)
        with pytest.raises(ValueError, match="at least one item"):
            share([])

    @pytest.mark.parametrize(("df", "t"), [(2, 4.303), (4, 2.776), (9, 2.262), (78, 1.991)])
    def test_stretch_knows_student(self, df, t):
        n = df + 1
        assert stretch(n) == pytest.approx(np.sqrt(n / df) * t / 1.96, rel=0.035)

    @pytest.mark.parametrize(("units", "at_least"), [(3, 0.85), (8, 0.90), (40, 0.92)])
    def test_coverage(self, units, at_least):
        rng = np.random.default_rng(units)
        drawn = rng.beta(2, 3, size=(250, units))
        intervals = [bootstrap_interval(row, f"trial {i}", bounds=(0, 1)) for i, row in enumerate(drawn)]
        covered = np.mean([low <= 0.4 <= high for low, high in intervals])
        assert at_least <= covered <= 0.99

    def test_large_sample_agrees_with_the_normal_interval(self):
        sample = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
        half = 1.96 * sample.std() / np.sqrt(2000)
        expected = (sample.mean() - half, sample.mean() + half)
        assert bootstrap_interval(sample, "normal") == pytest.approx(expected, abs=0.01)

    def test_estimate_lies_inside(self):
        # ICAT peaks at SS = 50: no resample gets there, the estimate does.
        per_term = np.array([[0.0, 100.0], [100.0, 100.0]] * 10)
        low, high = bootstrap_interval(per_term, "icat", lambda m: icat(m[..., 0], m[..., 1]), bounds=(0, 100))
        assert low < 100.0 == high

    def test_seed_is_the_same_in_every_process(self):
        command = "from biasunlearn_trainer.eval.metrics import seed_from_name; print(seed_from_name('stereoset/ss'))"
        printed = {
            subprocess.run(
                [sys.executable, "-c", command],
                env={"PYTHONHASHSEED": seed},
                capture_output=True,
                text=True,
                check=True,
            ).stdout.strip()
            for seed in ("1", "2")
        }
        assert printed == {str(seed_from_name("stereoset/ss"))}
        assert seed_from_name("a") != seed_from_name("b")

    @pytest.mark.parametrize("values", [[], [1.0, float("inf")]])
    def test_nothing_to_resample(self, values):
        with pytest.raises(ValueError, match="at least one unit and finite values"):
            bootstrap_interval(np.array(values), "x")

    def test_needs_numpy_alone(self):
        command = (
            "import sys, biasunlearn_trainer.eval.metrics, biasunlearn_trainer.eval.schema;"
            "print([m for m in ('torch', 'transformers', 'datasets', 'scipy') if m in sys.modules])"
        )
        printed = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
        assert printed.strip() == "[]"


class TestPairedDifference:
    def test_shares_by_hand(self):
        # 100 items, 10 lost and none gained: p_up = 1/102, p_down = 11/102, se = sqrt((12/102 - (10/102)^2) / 102)
        before = np.ones(100, dtype=bool)
        after = before.copy()
        after[:10] = False
        change = paired_difference(before, after, "facts")
        centre, se = -10 / 102, np.sqrt((12 / 102 - (10 / 102) ** 2) / 102)
        assert change.value == pytest.approx(-0.10)
        assert change.ci95 == pytest.approx((centre - 1.96 * se, centre + 1.96 * se), abs=1e-4)
        assert change.n == 100

    def test_no_change_of_shares_is_not_certainty(self):
        low, high = paired_difference(np.ones(10, dtype=bool), np.ones(10, dtype=bool), "facts").ci95
        assert low < 0 < high

    def test_pairing_takes_the_common_part_out(self):
        rng = np.random.default_rng(0)
        before = rng.normal(0, 10, size=200)
        after = before + 1 + rng.normal(0, 0.1, size=200)
        low, high = paired_difference(before, after, "logp").ci95
        assert 0.95 < low < high < 1.05

    def test_statistic_of_several_columns(self):
        before, after = np.array([[70.0, 90.0]] * 5), np.array([[50.0, 90.0]] * 5)
        change = paired_difference(before, after, "icat", lambda m: icat(m[..., 0], m[..., 1]))
        # 90 * 50 / 50 - 90 * 30 / 50
        assert change.value == pytest.approx(36.0)

    def test_other_items_are_refused(self):
        with pytest.raises(ValueError, match="same items before and after"):
            paired_difference(np.zeros(3), np.zeros(4), "x")
