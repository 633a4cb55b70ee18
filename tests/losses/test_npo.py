import math

import pytest
import torch

from biasunlearn_trainer.losses import npo_biasunlearn_loss, npo_loss, npo_mllmu_loss, simnpo_loss

POLICY, REFERENCE, LENGTHS = [-6.0, -3.0, -20.0], [-4.0, -4.0, -5.0], [2, 1, 5]


def batch(dtype=torch.float32):
    policy, reference = torch.tensor(POLICY, dtype=dtype), torch.tensor(REFERENCE, dtype=dtype)
    return policy.requires_grad_(), reference.requires_grad_(), torch.tensor(LENGTHS)


def softplus(x):
    """log(1 + e^x) = -log sigmoid(-x), by the standard library."""
    return math.log1p(math.exp(x))


def test_npo_by_hand():
    # log(pi/ref) = -6 + 4 = -2 = -log(e^2); beta 1: 2 log(1 + e^-2) = 2 * 0.126928 = 0.253856.
    # beta 0.5: 4 log(1 + e^-1) = 4 * 0.313262 = 1.253047.
    policy, reference = torch.tensor([-6.0]), torch.tensor([-4.0])
    assert npo_loss(policy, reference, beta=1.0).item() == pytest.approx(0.253856, abs=1e-6)
    assert npo_loss(policy, reference, beta=0.5).item() == pytest.approx(1.253047, abs=1e-6)


def test_npo_default_beta_is_the_papers():
    policy, reference, _ = batch()
    # 20 log(1 + e^(0.1 r)) for r = -2, 1, -15.
    expected = [20 * softplus(0.1 * r) for r in (-2, 1, -15)]
    assert npo_loss(policy, reference).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.5])
def test_npo_of_equal_policies_is_two_over_beta_log_two(beta):
    logps = torch.tensor([-3.0, -300.0])
    assert npo_loss(logps, logps, beta).tolist() == pytest.approx([2 / beta * math.log(2)] * 2, rel=1e-6)


def test_npo_vanishes_with_the_ratio():
    # 20 log(1 + e^(-0.1 * 2000)) = 20 e^-200, which float32 has no number for.
    policy = torch.tensor([-2000.0], requires_grad=True)
    loss = npo_loss(policy, torch.tensor([0.0]))
    loss.sum().backward()
    assert loss.item() == 0
    assert policy.grad.item() == pytest.approx(0, abs=1e-30)


def test_npo_is_linear_where_the_completion_became_much_likelier():
    # (2/beta) log(1 + e^(beta r)) -> 2 r: no overflow of e^(0.1 * 20000).
    loss = npo_loss(torch.tensor([0.0]), torch.tensor([-20000.0]))
    assert loss.item() == pytest.approx(40000.0)


def test_npo_without_its_constant_tends_to_gradient_ascent():
    # (2/beta) [log(1 + e^(beta r)) - log 2] = r + beta r^2 / 4 + O(beta^3), and its derivative in r tends to 1.
    policy, reference, _ = batch(torch.float64)
    beta = 1e-5
    loss = npo_loss(policy, reference, beta) - 2 / beta * math.log(2)
    ratio = policy.detach() - reference.detach()
    torch.testing.assert_close(loss.detach(), ratio + beta * ratio**2 / 4, atol=1e-8, rtol=0)
    loss.sum().backward()
    torch.testing.assert_close(policy.grad, torch.ones_like(ratio), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("gap", "weight"), [(0.0, 1.0), (3.0, 0.85), (30.0, 0.095)])
def test_npo_gradient_is_ascent_weighted_by_the_gap(gap, weight):
    # 2 sigmoid(-0.1 gap): 2 sigmoid(-0.3) = 0.8511 for a per-token gap of 3, 2 sigmoid(-3) = 0.0949 for a summed 30.
    reference = torch.tensor([-10.0])
    policy = (reference - gap).requires_grad_()
    npo_loss(policy, reference, beta=0.1).sum().backward()
    assert policy.grad.item() == pytest.approx(2 / (1 + math.exp(0.1 * gap)), rel=1e-6)
    assert policy.grad.item() == pytest.approx(weight, abs=2e-3)


def test_npo_mean_reduction_keeps_the_weight_when_beta_grows_with_the_length():
    # Averaging 10 tokens divides the gap of 30 by 10; beta * 10 restores beta * gap = 3.
    policy, reference = torch.tensor([-40.0]), torch.tensor([-10.0])
    summed = npo_loss(policy, reference, beta=0.1)
    averaged = npo_loss(policy / 10, reference / 10, beta=1.0)
    torch.testing.assert_close(averaged * 10, summed)


def test_mllmu_by_hand():
    # Tokens 2 + 1 + 5 = 8, NLL 29/8 against 13/8: gap 2; (2/0.4) log(1 + e^(-0.8)) = 5 * 0.371101 = 1.855503.
    loss = npo_mllmu_loss(*batch())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(1.855503, abs=1e-6)


def test_biasunlearn_by_hand():
    # Per-sequence gaps 2/2 = 1, -1/1 = -1, 15/5 = 3: mean 1; 20 log(1 + e^(-0.1)) = 20 * 0.644397 = 12.887935.
    loss = npo_biasunlearn_loss(*batch())
    assert loss.shape == ()
    assert loss.item() == pytest.approx(12.887935, abs=1e-5)


@pytest.mark.parametrize("dialect", [npo_mllmu_loss, npo_biasunlearn_loss])
def test_a_dialect_of_one_sequence_is_npo_of_its_token_mean(dialect):
    policy, reference, lengths = (tensor[:1] for tensor in batch())
    expected = npo_loss(policy / 2, reference / 2, beta=0.3)[0]
    torch.testing.assert_close(dialect(policy, reference, lengths, beta=0.3), expected)


def test_the_dialects_agree_for_equal_lengths_and_differ_otherwise():
    policy, reference, lengths = batch()
    equal = torch.full((3,), 4)
    a, b = (f(policy, reference, equal, beta=0.2) for f in (npo_mllmu_loss, npo_biasunlearn_loss))
    torch.testing.assert_close(a, b)
    a, b = (f(policy, reference, lengths, beta=0.2) for f in (npo_mllmu_loss, npo_biasunlearn_loss))
    assert abs(a - b) > 0.1


@pytest.mark.parametrize("dialect", [npo_mllmu_loss, npo_biasunlearn_loss])
def test_cutting_a_batch_changes_a_dialect_but_not_npo(dialect):
    policy, reference, lengths = (tensor.detach() for tensor in batch())
    parts = [slice(0, 2), slice(2, 3)]
    cut = sum(dialect(policy[p], reference[p], lengths[p], beta=1.0) * len(policy[p]) for p in parts) / 3
    assert abs(cut - dialect(policy, reference, lengths, beta=1.0)) > 0.01
    cut = torch.cat([npo_loss(policy[p], reference[p]) for p in parts])
    assert torch.equal(cut, npo_loss(policy, reference))


@pytest.mark.parametrize("dialect", [npo_mllmu_loss, npo_biasunlearn_loss])
def test_dialects_survive_a_batch_without_tokens(dialect):
    zeros = torch.zeros(2)
    loss = dialect(zeros, zeros, torch.zeros(2, dtype=torch.long), beta=0.5)
    assert loss.item() == pytest.approx(4 * math.log(2))


@pytest.mark.parametrize(
    "loss", [npo_mllmu_loss, npo_biasunlearn_loss, lambda p, r, n, beta: simnpo_loss(p - r, n, beta)]
)
def test_extreme_gaps_stay_finite(loss):
    # 2 tokens that became e^(+-10000) times as likely: (2/beta) log(1 + e^(beta r)) tends to 2 r and to 0.
    zero, lengths = torch.zeros(1), torch.tensor([2])
    assert loss(zero, zero - 20000, lengths, beta=1.0).item() == pytest.approx(20000.0)
    assert loss(zero - 20000, zero, lengths, beta=1.0).item() == 0


def test_simnpo_by_hand():
    # Token means -6/2 = -3, -3/1 = -3, -20/5 = -4; beta 0.5: 4 log(1 + e^(0.5 m)) = 4 * (0.201413, 0.201413, 0.126928).
    policy, _, lengths = batch()
    loss = simnpo_loss(policy, lengths, beta=0.5)
    assert loss.tolist() == pytest.approx([0.805653, 0.805653, 0.507712], abs=1e-6)


def test_simnpo_defaults_are_the_papers():
    # (2/4.5) log(1 + e^(4.5 * -0.2)) for 5 tokens of -1 in all, margin 0.
    loss = simnpo_loss(torch.tensor([-1.0]), torch.tensor([5]))
    assert loss.item() == pytest.approx(2 / 4.5 * softplus(-0.9), rel=1e-6)


def test_simnpo_delta_shifts_the_exponent_outside_beta():
    # (2/beta) log(1 + e^(beta m + delta)); m = -3, beta 0.5, delta 1.5: the exponent is 0, 4 log 2.
    policy, lengths = torch.tensor([-6.0], requires_grad=True), torch.tensor([2])
    loss = simnpo_loss(policy, lengths, beta=0.5, delta=1.5)
    assert loss.item() == pytest.approx(4 * math.log(2))
    # and a shift by delta is a shift of the token mean by delta / beta = 3
    torch.testing.assert_close(loss, simnpo_loss(policy * 0, lengths, beta=0.5))
    # weight 2 sigmoid(0) / |y|
    loss.sum().backward()
    assert policy.grad.item() == pytest.approx(0.5)


def test_simnpo_gradient_does_not_grow_with_the_length():
    # 2 sigmoid(beta m) / |y| per log-probability of the sequence: repeating a completion twice halves it.
    policy, lengths = torch.tensor([-4.0, -8.0], requires_grad=True), torch.tensor([2, 4])
    simnpo_loss(policy, lengths).sum().backward()
    assert policy.grad[0].item() == pytest.approx(2 * policy.grad[1].item())
    assert policy.grad[0].item() == pytest.approx(2 / (1 + math.exp(4.5 * 2)) / 2, rel=1e-5)


def test_gradcheck():
    policy, reference, lengths = batch(torch.float64)
    reference = reference.detach()
    check = torch.autograd.gradcheck
    assert check(lambda x: npo_loss(x, reference), policy)
    assert check(lambda x: npo_mllmu_loss(x, reference, lengths), policy)
    assert check(lambda x: npo_biasunlearn_loss(x, reference, lengths), policy)
    assert check(lambda x: simnpo_loss(x, lengths, beta=0.7, delta=0.2), policy)


@pytest.mark.parametrize("beta", [0, -0.1, math.nan])
@pytest.mark.parametrize(
    ("loss", "paper_value"),
    [(npo_loss, 0.1), (npo_mllmu_loss, 0.4), (npo_biasunlearn_loss, 0.1), (simnpo_loss, 4.5)],
)
def test_beta_must_be_positive(loss, paper_value, beta):
    policy, reference, lengths = batch()
    args = {npo_loss: (policy, reference), simnpo_loss: (policy, lengths)}.get(loss, (policy, reference, lengths))
    message = f"^`beta` must be positive, got {beta}. Use {paper_value}, the paper's value.$"
    with pytest.raises(ValueError, match=message):
        loss(*args, beta=beta)
