import pytest
import torch

from biasunlearn_trainer.losses import gradient_ascent_loss, nll_loss, token_log_probs

# Two sequences of 2 and 1 completion tokens: means (-1 - 3)/2 = -2 and -5/1 = -5.
LOGPS = [[-9.0, -1.0, -3.0], [-9.0, -5.0, -9.0]]
MASK = [[False, True, True], [False, True, False]]


def test_values_by_hand():
    logps, mask = torch.tensor(LOGPS), torch.tensor(MASK)
    assert nll_loss(logps, mask).tolist() == [2.0, 5.0]
    assert gradient_ascent_loss(logps, mask).tolist() == [-2.0, -5.0]


def test_gradients_by_hand():
    # d NLL / d log pi(y_t) = -1/|y| on a completion token and 0 elsewhere; ascent is its negative.
    logps = torch.tensor(LOGPS, requires_grad=True)
    expected = torch.tensor([[0.0, -0.5, -0.5], [0.0, -1.0, 0.0]])
    for loss, sign in ((nll_loss, 1), (gradient_ascent_loss, -1)):
        (grad,) = torch.autograd.grad(loss(logps, torch.tensor(MASK)).sum(), logps)
        assert torch.equal(grad, sign * expected)


def test_nll_equals_cross_entropy_per_sequence():
    logits = torch.randn(1, 4, 9, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([[3, 1, 8, 0]])
    loss = nll_loss(token_log_probs(logits, targets), torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(loss[0], torch.nn.functional.cross_entropy(logits[0], targets[0]))


def test_one_descent_step_on_the_ascent_loss_makes_the_target_less_likely():
    logits = torch.zeros(1, 1, 4, requires_grad=True)
    target, mask = torch.tensor([[2]]), torch.tensor([[True]])
    gradient_ascent_loss(token_log_probs(logits, target), mask).sum().backward()
    stepped = (logits - logits.grad).detach()
    assert token_log_probs(stepped, target).item() < token_log_probs(logits, target).item()


@pytest.mark.parametrize("loss", [nll_loss, gradient_ascent_loss])
def test_gradcheck(loss):
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor(MASK)), logps)
