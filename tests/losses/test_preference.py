import math

import pytest
import torch

from biasunlearn_trainer.losses import dpo_loss, npo_loss

# log(pi/ref): chosen -3 + 5 = 2, rejected -7 + 6 = -1, so the margin is 3.
LOGPS = {"policy_chosen": -3.0, "policy_rejected": -7.0, "reference_chosen": -5.0, "reference_rejected": -6.0}


def logps(dtype=torch.float32):
    return {name: torch.tensor([value], dtype=dtype, requires_grad=True) for name, value in LOGPS.items()}


def test_dpo_by_hand():
    # log(1 + e^-3) = 0.0485874 for beta 1; log(1 + e^-0.3) = 0.554355 for the default 0.1.
    assert dpo_loss(**logps(), beta=1.0).item() == pytest.approx(0.0485874, abs=1e-6)
    assert dpo_loss(**logps()).item() == pytest.approx(0.554355, abs=1e-6)


def test_dpo_gradient_by_hand():
    # d/d chosen = -beta sigmoid(-beta 3) and the opposite for rejected: 0.1 * 0.425557 = 0.0425557.
    values = logps()
    dpo_loss(**values).sum().backward()
    assert values["policy_chosen"].grad.item() == pytest.approx(-0.0425557, abs=1e-7)
    assert values["policy_rejected"].grad.item() == pytest.approx(0.0425557, abs=1e-7)


def test_dpo_of_equal_policies_is_log_two():
    chosen, rejected = torch.tensor([-3.0, -90.0]), torch.tensor([-8.0, -1.0])
    assert dpo_loss(chosen, rejected, chosen, rejected).tolist() == pytest.approx([math.log(2)] * 2)


def test_dpo_survives_extreme_margins():
    zero, far = torch.zeros(1), torch.tensor([-1e6])
    assert dpo_loss(zero, far, zero, zero, beta=1.0).item() == 0
    assert dpo_loss(far, zero, zero, zero, beta=1.0).item() == pytest.approx(1e6)


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_with_an_unmoved_chosen_completion_is_npo_up_to_its_factor(beta):
    policy, reference, chosen = torch.tensor([-6.0, -1.0]), torch.tensor([-4.0, -4.0]), torch.tensor([-2.0, -9.0])
    dpo = dpo_loss(chosen, policy, chosen, reference, beta)
    torch.testing.assert_close(2 / beta * dpo, npo_loss(policy, reference, beta))


def test_dpo_of_the_swapped_pair_mirrors_the_margin():
    # -log sigmoid(-m) = -log sigmoid(m) + m, with m = 0.1 * 3.
    values = logps()
    swapped = dpo_loss(
        *(values[n] for n in ("policy_rejected", "policy_chosen", "reference_rejected", "reference_chosen"))
    )
    torch.testing.assert_close(swapped, dpo_loss(**values) + 0.3)


def test_dpo_gradcheck():
    values = logps(torch.float64)
    references = values["reference_chosen"].detach(), values["reference_rejected"].detach()
    policy = values["policy_chosen"], values["policy_rejected"]
    assert torch.autograd.gradcheck(lambda c, r: dpo_loss(c, r, *references), policy)


def test_dpo_beta_must_be_positive():
    with pytest.raises(ValueError, match=r"`beta` must be positive, got 0\. Use 0\.1, the paper's value\."):
        dpo_loss(**logps(), beta=0)
