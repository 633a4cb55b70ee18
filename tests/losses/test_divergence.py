import math

import pytest
import torch
from torch.nn.functional import kl_div

from biasunlearn_trainer.losses import kl_loss, token_kl

# P = (1/2, 1/2) under the reference and Q = (1/4, 3/4) under the policy.
REFERENCE, POLICY = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()


def random_logits(seed, *shape, scale=3.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def slow_kl(first, second):
    """sum p log(p/q) in probability space, float64, one position at a time."""
    first, second = (logits.double().softmax(-1).flatten(0, -2) for logits in (first, second))
    sums = [
        sum(p * math.log(p / q) for p, q in zip(ps, qs, strict=True))
        for ps, qs in zip(first.tolist(), second.tolist(), strict=True)
    ]
    return torch.tensor(sums)


def test_token_kl_by_hand():
    # KL(P||Q) = 1/2 log 2 + 1/2 log(2/3) = 0.143841; KL(Q||P) = 1/4 log(1/2) + 3/4 log(3/2) = 0.130812.
    assert token_kl(POLICY, REFERENCE).item() == pytest.approx(0.143841, abs=1e-6)
    assert token_kl(POLICY, REFERENCE, "reverse").item() == pytest.approx(0.130812, abs=1e-6)


def test_token_kl_gradient_by_hand():
    # d KL(P||Q) / d policy logits = Q - P.
    policy = POLICY.clone().requires_grad_()
    token_kl(policy, REFERENCE).sum().backward()
    torch.testing.assert_close(policy.grad, torch.tensor([[-0.25, 0.25]]))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_token_kl_equals_a_slow_reference(direction):
    policy, reference = random_logits(0, 2, 3, 13), random_logits(1, 2, 3, 13)
    expected = slow_kl(reference, policy) if direction == "forward" else slow_kl(policy, reference)
    torch.testing.assert_close(token_kl(policy, reference, direction).flatten(), expected, rtol=1e-5, atol=1e-6)


def test_token_kl_equals_torch():
    policy, reference = random_logits(0, 4, 13), random_logits(1, 4, 13)
    torchs = kl_div(policy.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(token_kl(policy, reference), torchs)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_token_kl_is_zero_at_equality_with_zero_gradient(direction):
    logits = random_logits(0, 5, 100).requires_grad_()
    kl = token_kl(logits, logits + 7, direction)  # a shift of all logits is the same distribution
    kl.sum().backward()
    torch.testing.assert_close(kl, torch.zeros(5), atol=1e-6, rtol=0)
    torch.testing.assert_close(logits.grad, torch.zeros(5, 100), atol=1e-6, rtol=0)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_token_kl_is_not_negative(direction, scale):
    kl = token_kl(random_logits(0, 200, 50, scale=scale), random_logits(1, 200, 50, scale=scale), direction)
    assert kl.min() >= -1e-6
    assert kl.max() > 0


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_token_kl_survives_extreme_logits(direction):
    # log p = 0 and -2e4 against -2e4 and 0: KL = 1 * 2e4 + 0 * (-2e4); a floor of 1e-12 would say 27.6.
    policy = torch.tensor([[1e4, -1e4]], requires_grad=True)
    kl = token_kl(policy, torch.tensor([[-1e4, 1e4]]), direction)
    kl.sum().backward()
    assert kl.item() == pytest.approx(2e4)
    assert policy.grad.isfinite().all()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_a_word_that_both_exclude_adds_nothing(direction):
    excluded = torch.tensor([[-math.inf]])
    policy = torch.cat([POLICY, excluded], 1).requires_grad_()
    kl = token_kl(policy, torch.cat([REFERENCE, excluded], 1), direction)
    kl.sum().backward()
    torch.testing.assert_close(kl, token_kl(POLICY, REFERENCE, direction))
    assert policy.grad.isfinite().all()


def test_bfloat16_logits_are_compared_in_float32():
    policy, reference = random_logits(0, 4, 500, dtype=torch.bfloat16), random_logits(1, 4, 500, dtype=torch.bfloat16)
    kl = token_kl(policy, reference)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, slow_kl(reference, policy), rtol=1e-5, atol=1e-6, check_dtype=False)


def test_float64_is_kept_and_gradients_are_right():
    policy, reference = (random_logits(s, 2, 3, 5, dtype=torch.float64) for s in (0, 1))
    mask = torch.tensor([[True, True, False], [True, False, False]])
    policy.requires_grad_()
    for direction in ("forward", "reverse"):
        assert torch.autograd.gradcheck(lambda x, d=direction: token_kl(x, reference, d), policy)
        assert torch.autograd.gradcheck(lambda x, d=direction: kl_loss(x, reference, mask, d), policy)


def test_kl_loss_averages_each_sequence_over_its_kept_tokens():
    # Row 0 keeps (0.143841, 0): mean 0.071921. Row 1 keeps 0.143841 alone.
    policy = torch.stack([torch.cat([POLICY, REFERENCE, POLICY]), torch.cat([REFERENCE, POLICY, POLICY])])
    reference = REFERENCE.expand(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert kl_loss(policy, reference, mask).tolist() == pytest.approx([0.071921, 0.143841], abs=1e-6)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_kl_loss_does_not_see_padding(direction):
    policy, reference = random_logits(0, 2, 6, 9), random_logits(1, 2, 6, 9)
    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    policy[:, 3:] = math.nan
    padded = kl_loss(policy, reference, mask, direction)
    assert torch.equal(padded, kl_loss(policy[:, :3], reference[:, :3], mask[:, :3], direction))


def test_batchmean_is_wrong_by_the_number_of_positions():
    policy, reference = random_logits(0, 2, 7, 9), random_logits(1, 2, 7, 9)
    batchmean = kl_div(policy.log_softmax(-1), reference.log_softmax(-1), log_target=True, reduction="batchmean")
    right = kl_loss(policy, reference, torch.ones(2, 7, dtype=torch.bool)).mean()
    torch.testing.assert_close(batchmean, 7 * right)


@pytest.mark.parametrize("direction", ["foward", "forwards", "FORWARD"])
def test_an_unknown_direction_names_the_nearest(direction):
    with pytest.raises(ValueError, match=f"got '{direction}'. Did you mean 'forward'?"):
        token_kl(POLICY, REFERENCE, direction)


def test_vocabularies_must_agree():
    with pytest.raises(ValueError, match=r"`policy_logits` \(2, 1\), `reference_logits` \(2, 5\)"):
        token_kl(torch.zeros(2, 1), torch.zeros(2, 5))
