import math

import pytest
import torch

from biasunlearn_trainer.losses import sequence_mean, sequence_sum, token_log_probs


def test_token_log_probs_by_hand():
    # exp(logits) = (1, 2, 5), sum 8: log 1/8, log 2/8, log 5/8.
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(3, 3)
    expected = torch.tensor([1 / 8, 2 / 8, 5 / 8]).log()
    torch.testing.assert_close(token_log_probs(logits, torch.arange(3)), expected)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4)])
def test_token_log_probs_equal_log_softmax_for_any_leading_shape(shape):
    logits = torch.randn(*shape, 11, generator=torch.Generator().manual_seed(0)) * 5
    targets = torch.randint(11, shape, generator=torch.Generator().manual_seed(1))
    slow = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(token_log_probs(logits, targets), slow)


def test_token_log_probs_do_not_change_with_a_shift_of_the_logits():
    logits = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)
    torch.testing.assert_close(
        token_log_probs(logits + 100, targets), token_log_probs(logits, targets), atol=3e-5, rtol=0
    )


def test_token_log_probs_survive_extreme_logits():
    # exp(1e4) overflows float32; log p is 0 for the certain word and -2e4 for the other.
    logits = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    logps = token_log_probs(logits, torch.tensor([0, 1]))
    assert logps.tolist() == [0.0, -2e4]
    logps.sum().backward()
    assert logits.grad.isfinite().all()


def test_token_log_probs_ignore_words_of_probability_zero():
    logits = torch.tensor([[0.0, 0.0, -math.inf]], requires_grad=True)
    logps = token_log_probs(logits, torch.tensor([0]))
    logps.sum().backward()
    torch.testing.assert_close(logps.detach(), torch.tensor([-math.log(2)]))
    torch.testing.assert_close(logits.grad, torch.tensor([[0.5, -0.5, 0.0]]))


def test_token_log_probs_of_bfloat16_logits_are_those_of_the_same_numbers_in_float32():
    logits = (torch.randn(6, 500, generator=torch.Generator().manual_seed(0)) * 4).bfloat16()
    targets = torch.arange(6)
    logps = token_log_probs(logits, targets)
    assert logps.dtype == torch.float32
    assert torch.equal(logps, token_log_probs(logits.float(), targets))


def test_bfloat16_gradient_of_a_confident_token_is_not_rounded_away():
    # p = 1/(1 + e^-8) = 0.99966, so d log p / d logit = 1 - p = 3.4e-4. In bfloat16 p rounds to 1, and 1 - 1 is 0.
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    token_log_probs(logits, torch.tensor([0])).sum().backward()
    assert logits.grad[0, 0].item() == pytest.approx(1 / (1 + math.exp(8)), rel=1 / 128)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_token_log_probs_keep_at_most_the_upcast_for_the_backward_pass(dtype, fused):
    logits = torch.randn(8, 1000).to(dtype).requires_grad_()
    kept = {}

    def pack(tensor):
        if tensor.numel() >= logits.numel():
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_log_probs(logits, torch.arange(8), fused)
    kept.pop(logits.untyped_storage().data_ptr(), None)
    assert len(kept) == (0 if fused else int(dtype == torch.bfloat16))


def test_token_log_probs_refuse_misaligned_shapes():
    with pytest.raises(ValueError, match=r"equal shapes, got `logits\[..., 0\]` \(2, 3\), `targets` \(2, 4\)"):
        token_log_probs(torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long))


def test_token_log_probs_gradcheck():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, torch.tensor([0, 4, 2])), logits)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.float32])
def test_sums_and_means_by_hand(mask_dtype):
    values = torch.tensor([[-1.0, -3.0, -9.0], [-2.0, -4.0, -6.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 1]]).to(mask_dtype)
    assert sequence_sum(values, mask).tolist() == [-4.0, -6.0]
    assert sequence_mean(values, mask).tolist() == [-2.0, -6.0]


@pytest.mark.parametrize("reduce", [sequence_sum, sequence_mean])
def test_padding_changes_neither_value_nor_gradient(reduce):
    values = torch.tensor([[-1.0, -3.0], [-2.0, -5.0]], requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    padding = torch.tensor([[math.nan, -7.0, math.inf]]).expand(2, 3)
    padded = reduce(torch.cat([values, padding], 1), torch.cat([mask, torch.zeros(2, 3, dtype=torch.bool)], 1))
    assert torch.equal(padded, reduce(values, mask))
    (padded_grad,) = torch.autograd.grad(padded.sum(), values)
    (grad,) = torch.autograd.grad(reduce(values, mask).sum(), values)
    assert torch.equal(padded_grad, grad)


@pytest.mark.parametrize("reduce", [sequence_sum, sequence_mean])
def test_a_sequence_without_a_kept_token_gives_zero_with_zero_gradient(reduce):
    values = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    result = reduce(values, torch.zeros(1, 2, dtype=torch.bool))
    result.sum().backward()
    assert result.item() == 0
    assert values.grad.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("reduce", [sequence_sum, sequence_mean])
def test_reductions_refuse_a_mask_that_would_broadcast(reduce):
    with pytest.raises(ValueError, match=r"`values` \(2, 3\), `mask` \(2, 1\)"):
        reduce(torch.zeros(2, 3), torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("reduce", [sequence_sum, sequence_mean])
def test_reductions_accumulate_half_precision_in_float32(reduce):
    # 1 + 2^-9 + ... in bfloat16 (8 bits) would stay at 1: the sum of 1 and 512 times 2^-9 is 2.
    values = torch.full((1, 513), 2.0**-9, dtype=torch.bfloat16)
    values[0, 0] = 1
    expected = 2.0 if reduce is sequence_sum else 2 / 513
    result = reduce(values, torch.ones(1, 513, dtype=torch.bool))
    assert result.dtype == torch.float32
    assert result.item() == pytest.approx(expected, rel=1e-6)
