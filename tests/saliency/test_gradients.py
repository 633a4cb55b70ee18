"""Masked gradients, a few rows at a time."""

import pytest
import torch

from biasunlearn_trainer.saliency import gradients
from biasunlearn_trainer.saliency.gradients import salient_gradient


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2), (2, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_taken_in_turn_make_the_whole(shape, dtype, monkeypatch):
    monkeypatch.setattr(gradients, "CHUNK", 6)  # less than a row of the last shape
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(shape, generator=generator).to(dtype)
    salient = torch.rand(shape, generator=generator) < 0.5
    masked = salient_gradient(gradient, salient)
    assert masked.dtype == dtype and masked is not gradient
    assert torch.equal(masked, gradient.masked_fill(~salient, 0))
    # A weight's gradient may come transposed out of its product.
    turned = salient_gradient(gradient.mT if len(shape) > 1 else gradient, salient.mT if len(shape) > 1 else salient)
    assert torch.equal(turned.mT if len(shape) > 1 else turned, masked)
