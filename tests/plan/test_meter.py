"""The meter on tensors whose bytes are known."""

import pytest
import torch
from torch import nn

from biasunlearn_trainer.plan.meter import StepBytes, TensorBytes
from biasunlearn_trainer.plan.shadow import Shadow


def test_the_meter_meters():
    weight = torch.zeros(1000)
    with TensorBytes(weight) as meter:
        doubled = weight * 2
        del doubled
        tripled = weight * 3
    assert meter.now == 8000 and meter.peak == 8000 and tripled.sum() == 0


def test_a_view_is_no_second_tensor():
    with TensorBytes() as meter:
        whole = torch.zeros(10, 10)
        assert whole[0].shape == (10,) and whole.t().shape == (10, 10)
    assert meter.peak == 400


def test_gradients_of_weights_are_told_apart():
    layer = nn.Linear(10, 20, bias=False)  # 800 bytes
    with StepBytes(layer) as meter:
        layer(torch.zeros(3, 10)).sum().backward()  # 120, 240 and 4 bytes come in beside it
    meter.close()
    assert meter.steady == 800 and meter.gradients == 800
    assert meter.levels[0] >= 120 + 240 + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_has_no_memory_has_the_same_bytes(dtype):
    """A small network with a mask among its indices: the same operations, the same peak, real or not."""

    def network():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 5)).to(dtype)
        ids, mask = torch.arange(12).view(2, 6) % 7, torch.arange(12).view(2, 6) > 7
        with StepBytes(model) as meter:
            chosen = model(ids)[mask]
            assert chosen.shape == (4, 5)
            chosen.float().logsumexp(-1).mean().backward()
        meter.close()
        return meter

    real = network()
    with Shadow():
        shadowed = network()
    assert shadowed.steady == real.steady == (7 * 16 + 17 * 32 + 33 * 5) * dtype.itemsize
    assert shadowed.peak == real.peak and shadowed.levels == real.levels


def test_large_weights_take_no_memory():
    with Shadow():
        weight = torch.empty(2**20, 2**20)  # 4 TiB
        mask = torch.zeros(2**13, 2**13, dtype=torch.bool)
        assert (weight * 2).nbytes == 2**42
        assert torch.zeros(2**13, 2**13)[mask].shape == (2**25,)  # half, as nobody knows the mask
        assert torch.arange(5).sum() == 10
