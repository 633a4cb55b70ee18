"""The n most changed weights, counted in streams, against a plain sort."""

import numpy as np
import pytest
import torch
from torch import nn

from biasunlearn_trainer.saliency import ranking
from biasunlearn_trainer.saliency.distribution import Share
from biasunlearn_trainer.saliency.places import Place, Places
from biasunlearn_trainer.saliency.ranking import most_changed

A, B, C = (Place("all", None, kind) for kind in "abc")


class Fixed(Places):
    """Places of three flat weights `a`, `b`, `c`, 20 elements each unless said otherwise."""

    def __init__(self, sizes=(20, 20, 20)):
        self.sizes = dict(zip((A, B, C), sizes, strict=True))

    def of(self, name):
        return Place("all", None, name)


def chosen(found):
    return [found.shares[place].chosen for place in (A, B, C)]


def stream(**changes):
    return lambda: ((name, torch.as_tensor(change)) for name, change in changes.items())


def test_by_hand():
    changes = stream(a=[0.5, -3.0, 0.0], b=[[2.0], [-2.5]], c=[0.1])
    found = most_changed(changes, Fixed((3, 2, 1)), 3)
    assert chosen(found) == [1, 2, 0]
    assert (found.num, found.num_changed, found.smallest) == (3, 5, 2.0)
    assert found.shares[B] == Share(2, 2)


def test_a_tie_is_split_in_proportion():
    """Two slots are left for the ten weights at 1.0, eight in `a` and two in `b`."""
    changes = stream(a=[1.0] * 8 + [5.0], b=[-1.0] * 2 + [7.0], c=[0.5] * 4)
    assert chosen(most_changed(changes, Fixed(), 4)) == pytest.approx([1 + 1.6, 1 + 0.4, 0])


def test_what_did_not_change_is_never_chosen():
    found = most_changed(stream(a=[0.0, 1e-45, -0.0], b=[2.0]), Fixed(), 10)
    assert chosen(found) == [1, 1, 0] and found.num == found.num_changed == 2
    assert chosen(most_changed(stream(a=[0.0, -0.0]), Fixed(), 10)) == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num", [1, 2, 777, 15_000, 29_999, 30_000])
def test_like_a_plain_sort(num, dtype, monkeypatch):
    """Values over thirty orders of magnitude, in bfloat16 with many ties, in pieces of 1,000."""
    monkeypatch.setattr(ranking, "AT_ONCE", 1000)
    random = np.random.default_rng(num)
    values = {
        name: torch.tensor(random.standard_normal(10_000) * 10.0 ** random.uniform(-spread, spread, 10_000)).to(dtype)
        for name, spread in (("a", 0.1), ("b", 1), ("c", 15))
    }
    found = most_changed(stream(**values), Fixed((10_000,) * 3), num)
    flat = torch.cat([values[name].float().abs() for name in "abc"])
    edge = flat.sort(descending=True).values[num - 1]
    assert found.smallest == edge
    above, tied = flat > edge, flat == edge
    left = num - int(above.sum())
    expected = [
        float(above[i * 10_000 :][:10_000].sum() + left * tied[i * 10_000 :][:10_000].sum() / tied.sum())
        for i in range(3)
    ]
    assert chosen(found) == pytest.approx(expected)
    assert sum(chosen(found)) == pytest.approx(num)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_diverged_run_is_named(value):
    with pytest.raises(ValueError, match="change of b is infinite or no number"):
        most_changed(stream(a=[1.0], b=[1.0, value]), Fixed(), 1)


def test_fewer_than_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        most_changed(stream(a=[1.0]), Fixed(), 0)


def test_a_name_outside_the_model_is_an_error():
    model = nn.Sequential(nn.Linear(2, 2))
    model.config = type("Config", (), {"model_type": "none"})()
    with pytest.raises(KeyError, match=r"no weight 1\.weight"):
        most_changed(stream(**{"1.weight": [1.0]}), Places(model, {"all": [""]}), 1)
