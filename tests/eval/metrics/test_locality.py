"""Localities by hand: three protocols and the divergence, ideal and worst."""

import math

import numpy as np
import pytest

from biasunlearn_trainer.eval.metrics import Choices, locality_scores
from biasunlearn_trainer.eval.metrics.locality import is_top1_unchanged, token_kl, topk_overlap, topk_positional


def choices(*ids, p=None):
    p = p or [0.5, 0.2, 0.1, 0.05][: len(ids)]
    return Choices(ids, tuple(math.log(share) for share in p))


def test_protocols_by_hand():
    before = [choices(7, 8, 9), choices(1, 2, 3)]
    after = [choices(7, 9, 8), choices(2, 1, 4)]
    # First choices: 7 stays, 1 -> 2. Of three words three stay, then two. Ranks: 7 stays alone, then none.
    assert not is_top1_unchanged(before, after) and is_top1_unchanged(before[:1], after[:1])
    assert topk_overlap(before, after, 3) == pytest.approx((3 / 3 + 2 / 3) / 2)
    assert topk_positional(before, after, 3) == pytest.approx((1 / 3 + 0) / 2)
    assert topk_positional(before, after, 1) == pytest.approx(1 / 2)


def test_kl_over_a_whole_vocabulary_is_exact():
    # KL of (1/2, 1/4, 1/4) to (1/4, 1/2, 1/4): 1/2 ln 2 - 1/4 ln 2, whatever the order of the lists.
    before, after = choices(0, 1, 2, p=[0.5, 0.25, 0.25]), choices(1, 0, 2, p=[0.5, 0.25, 0.25])
    assert token_kl(before, after) == pytest.approx(0.25 * math.log(2))
    assert token_kl(before, before) == 0.0


def test_kl_of_lists_that_differ_is_the_least_possible():
    # Word 0 is in both. Word 1 (0.1) is not in the second list, whose words take 0.9: at most 0.1 is left for it, and
    # then all else has 0.1 before and 0.5 after.
    before, after = choices(0, 1, p=[0.8, 0.1]), choices(2, 0, p=[0.5, 0.4])
    expected = 0.8 * math.log(2) + 0.1 * math.log(0.1 / 0.1) + 0.1 * math.log(0.1 / 0.5)
    assert token_kl(before, after) == pytest.approx(expected)


def test_kl_of_random_distributions_from_below():
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, q = (rng.dirichlet(np.full(12, 0.3)) + 1e-9 for _ in range(2))
        p, q = p / p.sum(), q / q.sum()
        exact = float((p * np.log(p / q)).sum())
        lists = [
            [
                Choices(tuple(order[:k].tolist()), tuple(np.log(d[order[:k]]).tolist()))
                for d, order in ((d, np.argsort(-d)) for d in (p, q))
            ]
            for k in (3, 6, 12)
        ]
        few, more, all_words = (token_kl(*two) for two in lists)
        assert few <= exact + 1e-6 and more <= exact + 1e-6 and all_words == pytest.approx(exact, abs=1e-4)


def test_an_unchanged_and_a_changed_model():
    items = [[choices(1, 2), choices(3, 4)], [choices(5, 6)]]
    same = locality_scores(items, items, "t_locality", k=2, positional_k=1)
    assert {name: (m.value, m.n, m.ideal) for name, m in same.items()} == {
        "t_locality": (1.0, 2, 1.0),
        "t_locality_topk_overlap": (1.0, 2, 1.0),
        "t_locality_topk_positional": (1.0, 2, 1.0),
        "t_locality_kl": (0.0, 2, 0.0),
    }
    assert same["t_locality"].ci95[0] < 1.0 and same["t_locality_topk_overlap"].ci95[0] < 1.0
    assert same["t_locality_kl"].higher_is_better is False
    other = [[choices(8, 9), choices(8, 9)], [choices(5, 6)]]
    changed = locality_scores(items, other, "t_locality", k=2, positional_k=1)
    # The first item lost everything, the second nothing.
    assert [changed[f"t_locality{end}"].value for end in ("", "_topk_overlap", "_topk_positional")] == [0.5, 0.5, 0.5]
    # At its tokens 0.7 was on two words that now have at most 1 - 0.7, and 0.3 on the others, which now have 0.7.
    assert changed["t_locality_kl"].value == pytest.approx((0.4 * math.log(7 / 3) + 0) / 2)


def test_what_cannot_be_compared():
    item = [choices(1, 2)]
    for before, after, said in (
        ([], [], "needs the same items before and after, got 0 and 0"),
        ([item], [item, item], "got 1 and 2"),
        ([item], [item * 2], "item 0 has 1 tokens before and 2 after; use one tokenizer"),
        ([item], [[choices(1)]], "fewer than 2 choices"),
    ):
        with pytest.raises(ValueError, match=said):
            locality_scores(before, after, "t_locality", k=2, positional_k=1)
