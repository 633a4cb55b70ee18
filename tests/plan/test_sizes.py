"""Bytes by optimizer and backend, by hand and against the optimizers themselves."""

from dataclasses import replace

import pytest
import torch
from transformers import Trainer, TrainingArguments

from biasunlearn_trainer.plan.backends import LIVE_PARAMETERS, REDUCE_BUCKET, memory
from biasunlearn_trainer.plan.optimizers import optimizer_bytes
from biasunlearn_trainer.plan.quantised import PackedLinear
from biasunlearn_trainer.plan.trace import Step, Weight

BF16, FP32 = torch.bfloat16, torch.float32
# 1000 frozen and 200 trained weights in bfloat16: 2400 bytes; gradients of 400 bytes, 5000 beside none of them, 4800
# beside all of them.
STEP = Step(
    weights=[Weight((1000,), BF16), Weight((10, 20), BF16, True)],
    reference=7,
    mask=200,
    kept=0,
    levels={0: 5000, 400: 4800},
    tokens=64,
    blocks=[200, 300, 300, 400],
)


@pytest.mark.parametrize(
    "optim", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop", "adamw_torch momentum"]
)
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_states_are_those_of_the_optimizer(optim, dtype, tmp_path):
    """One step of what the Trainer makes of the name, and the bytes of the state that is there afterwards."""
    name, options = optim.split()[0], None
    if "momentum" in optim:
        name, options = "sgd", "momentum=0.9"
    args = TrainingArguments(output_dir=str(tmp_path), optim=name, optim_args=options, use_cpu=True)
    cls, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((30, 50), (2, 40, 60), (70,))]
    optimizer = cls(weights, **settings)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    real = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    )
    planned = optimizer_bytes(name, options, [Weight(tuple(w.shape), w.dtype, True) for w in weights])
    assert planned.known and planned.state == real


def test_8_bit_states_are_a_byte_and_a_scale_for_256():
    large, small = Weight((64, 128), BF16, True), Weight((100,), BF16, True)
    found = optimizer_bytes("paged_adamw_8bit", None, [large, small])
    assert found.state == 2 * (8192 + 4 * 32) + 2 * 400 and found.paged
    assert not optimizer_bytes("lomo", None, [large]).known


def test_packed_weights_have_the_bytes_of_nf4():
    layer = torch.nn.Linear(256, 512, bias=False, dtype=BF16)  # 131,072 weights, 2048 blocks of 64
    plain, nested = (PackedLinear(layer, 4, nested, BF16) for nested in (False, True))
    held = [
        sum(v.nbytes for v in (*m.parameters(), *m.buffers()))
        for m in (plain, nested, PackedLinear(layer, 8, False, BF16))
    ]
    assert held == [65_536 + 4 * 2048, 65_536 + 2048 + 4 * 8, 131_072 + 4 * 512]
    inputs = torch.ones(3, 256, dtype=BF16, requires_grad=True)
    nested(inputs).sum().backward()
    assert inputs.grad.shape == (3, 256) and nested.weight.grad is None


def made(backend, processes=4, **kwargs):
    return memory(replace(STEP, **kwargs), backend, processes, "adamw_torch_fused", None, mixed=False)


def test_one_process_holds_everything():
    found = made("none", 1)
    # 400 + 4800 at the end of the backward pass is more than 5000 at its beginning.
    assert (found.weights, found.gradients, found.optimizer, found.activations) == (2400, 400, 800, 4800)
    assert found.total == 2400 + 400 + 800 + 7 + 200 + 4800


def test_ddp_has_buckets_as_large_as_the_gradients():
    assert made("ddp").total == made("none", 1).total + 400


def test_zero2_shares_gradients_and_float32_states():
    found = made("zero2")
    # 400 / 4 + 4800 is now less than 5000 beside no gradient.
    assert (found.weights, found.gradients, found.activations) == (2400, 0, 5000)
    assert found.optimizer == (4 + 8) * 200 // 4 and found.buffers == 2 * REDUCE_BUCKET


def test_zero3_shares_weights_too():
    found = made("zero3")
    assert found.weights == 600 and found.gathered == 2 * 1200 and found.optimizer == 600
    huge = [Weight((4 * LIVE_PARAMETERS,), BF16), STEP.weights[1]]
    assert made("zero3", weights=huge).gathered == 2 * LIVE_PARAMETERS


def test_a_second_model_is_shared_by_zero3_alone_and_a_table_by_nobody():
    found = [made(backend, reference=4000, tables=9).reference for backend in ("ddp", "zero2", "fsdp2", "zero3")]
    assert found == [4009, 4009, 4009, 1009]


def test_fsdp2_gathers_two_layers_and_what_is_in_none():
    found = made("fsdp2")
    assert found.weights == 600 and found.gathered == 2 * (200 + 300 + 400) and found.optimizer == 200
    mixed = memory(STEP, "fsdp2", 4, "adamw_torch_fused", None, mixed=True)
    assert mixed.weights == 600 + 2 * 200 // 4 and mixed.optimizer == 8 * 200 // 4


def test_a_step_of_an_unfused_optimizer_can_be_the_fullest_moment():
    # SGD's step over all gradients needs nothing; AdamW over all weights at once another copy of them.
    step = replace(STEP, levels={0: 100})
    assert memory(step, "none", 1, "sgd", None, False).activations == 0
    assert memory(step, "none", 1, "adamw_torch", None, False).activations == 400
