"""The losses that go through positions in chunks equal those that autograd derives from the plain formula."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from biasunlearn_trainer.losses import fused, token_kl, token_log_probs

N, V = 37, 300


@pytest.fixture(params=[1, 7 * V + 5, 1 << 22])
def chunk(request, monkeypatch):
    """Chunks of one position, of seven (which 37 is no multiple of), and of all; references of 16 at a time."""
    monkeypatch.setitem(fused.CHUNK, "cpu", request.param)
    monkeypatch.setattr(fused, "REFERENCE_POSITIONS", 16)


def drawn(seed, dtype=torch.float32, scale=4.0):
    values = torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return values.to(dtype).requires_grad_()


def both(loss, dtype):
    """The loss and its gradient to the logits, fused and plain; each position counts differently."""
    weights, results = torch.linspace(-1, 2, N), []
    for is_fused in (True, False):
        logits = drawn(0, dtype)
        values = loss(logits, is_fused)
        (values * weights).sum().backward()
        results.append((values.detach(), logits.grad))
    return results


LOSSES = {
    "log probs": lambda logits, is_fused: token_log_probs(logits, torch.arange(N) * 7, is_fused),
    "forward": lambda logits, is_fused: token_kl(logits, drawn(1, logits.dtype), "forward", is_fused),
    "reverse": lambda logits, is_fused: token_kl(logits, drawn(1, logits.dtype), "reverse", is_fused),
    "by slices": lambda logits, is_fused: token_kl(logits, drawn(1, logits.dtype).detach().__getitem__, fused=is_fused),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_equal_the_plain_formula(name, dtype, chunk):
    (values, gradient), (plain, plain_gradient) = both(LOSSES[name], dtype)
    assert values.dtype == plain.dtype and gradient.dtype == dtype
    torch.testing.assert_close(values, plain, atol=1e-5, rtol=1e-5)
    near = 1e-5 if dtype != torch.bfloat16 else 1e-2
    torch.testing.assert_close(gradient, plain_gradient, atol=near, rtol=near)
    assert plain_gradient.abs().max() > 0.1


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck_over_chunks(direction, monkeypatch):
    monkeypatch.setitem(fused.CHUNK, "cpu", 10)
    policy, reference = (drawn(seed, torch.float64)[:5, :5].detach().requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(lambda x: token_kl(x, reference, direction), policy)
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, torch.arange(5)), policy)


def test_a_bfloat16_gradient_does_not_cancel_before_it_is_rounded():
    """One word at 6, one at 0: the likely word has p = 0.99753, in bfloat16 0.99609 or 1, and the gradient 1 - p."""
    logits = torch.tensor([[6.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    token_log_probs(logits, torch.tensor([0])).sum().backward()
    assert logits.grad[0, 0].item() == pytest.approx(2.4726e-3, rel=1e-2)


def test_nothing_is_kept_without_gradients(chunk):
    with torch.no_grad():
        assert not token_kl(drawn(0), drawn(1)).requires_grad


class _Largest(TorchDispatchMode):
    """Counts the tensors of all positions and words that are made inside."""

    def __init__(self):
        super().__init__()
        self.storages = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and value.untyped_storage().nbytes() >= N * V * 2:
                self.storages.add(value.untyped_storage()._cdata)
                self.kept = [*getattr(self, "kept", []), value]  # or an address would be used again
        return result


@pytest.mark.parametrize(("name", "most"), [("log probs", 1), ("forward", 2), ("reverse", 2)])
def test_how_many_tensors_of_the_logits_size_are_made(name, most, monkeypatch):
    monkeypatch.setitem(fused.CHUNK, "cpu", 7 * V)
    logits, reference, counts = drawn(0), drawn(1).detach(), []
    for is_fused in (True, False):
        before = {tensor.untyped_storage()._cdata for tensor in (logits, reference)}
        with _Largest() as largest:
            if name == "log probs":
                loss = token_log_probs(logits, torch.arange(N), is_fused)
            else:
                loss = token_kl(logits, reference, name, is_fused)
            torch.autograd.grad(loss.sum(), logits)
        counts.append(len(largest.storages - before))
    assert counts[0] <= most < counts[1]
