"""What holds for every loss alike: order, references, precision, shapes, no wait for the device, true examples."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

from biasunlearn_trainer import losses

B, T, V = 4, 5, 7
SCALARS = {"npo_mllmu_loss", "npo_biasunlearn_loss"}
LOSSES = sorted(name for name in losses.__all__ if name.endswith("_loss"))
PER_SEQUENCE = [name for name in LOSSES if name not in ("nll_loss", "gradient_ascent_loss", "kl_loss")]


def arguments(name, dtype=torch.float32, device="cpu"):
    """Random arguments for every tensor parameter of a loss, by the parameter's name."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"token_logps": (B, T), "policy_logits": (B, T, V), "reference_logits": (B, T, V)}
    result = {}
    for parameter in inspect.signature(getattr(losses, name)).parameters:
        if parameter == "mask":
            result[parameter] = torch.tensor(
                [[1, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [1, 1, 0, 0, 0]]
            ).bool()
        elif parameter == "lengths":
            result[parameter] = torch.tensor([5, 2, 1, 3])
        elif parameter not in ("beta", "delta", "direction"):
            drawn = -torch.rand(shapes.get(parameter, (B,)), generator=generator, dtype=torch.float64) * 9
            result[parameter] = drawn.to(dtype).requires_grad_()
    return {key: value.detach().to(device).requires_grad_(value.requires_grad) for key, value in result.items()}


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_sequences_does_not_matter(name):
    args, order = arguments(name), torch.tensor([2, 0, 3, 1])
    loss = getattr(losses, name)
    permuted = loss(**{key: value[order] for key, value in args.items()})
    torch.testing.assert_close(permuted, loss(**args) if name in SCALARS else loss(**args)[order])


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_reach_the_policy_and_never_the_reference(name):
    args = arguments(name)
    getattr(losses, name)(**args).sum().backward()
    for key, value in args.items():
        if key.startswith("reference"):
            assert value.grad is None, key
        elif value.is_floating_point():
            assert value.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision_goes_up_to_float32_and_never_down(name, dtype, result):
    args = arguments(name, dtype)
    loss = getattr(losses, name)(**args)
    assert loss.dtype == result
    exact = getattr(losses, name)(**{k: v.double() if v.is_floating_point() else v for k, v in args.items()})
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_gives_one_value_per_sequence_and_waits_for_no_device(name):
    # A tensor on the meta device has no numbers: `.item()` or a branch on a value, which stall a GPU, raise there.
    loss = getattr(losses, name)(**arguments(name, device="meta"))
    assert loss.shape == (() if name in SCALARS else (B,))


@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_a_trailing_dimension_is_refused_and_not_broadcast(name):
    args = arguments(name)
    for key, value in args.items():
        with pytest.raises(ValueError, match=rf"`{key}` must hold one value per sequence, shape \(B,\), got \(4, 1\)"):
            getattr(losses, name)(**{**args, key: value[:, None]})


@pytest.mark.parametrize("name", PER_SEQUENCE)
def test_sequences_must_be_equally_many(name):
    args = arguments(name)
    for key, value in args.items():
        with pytest.raises(ValueError, match=rf"equal shapes, got .*`{key}` \(1,\)"):
            getattr(losses, name)(**{**args, key: value[:1]})


@pytest.mark.parametrize("module", sorted(module.name for module in pkgutil.iter_modules(losses.__path__)))
def test_the_examples_in_the_docstrings_are_true(module):
    assert doctest.testmod(importlib.import_module(f"{losses.__name__}.{module}")).failed == 0


@pytest.mark.parametrize("name", losses.__all__)
def test_every_public_function_shows_an_example_and_what_it_raises(name):
    documentation = getattr(losses, name).__doc__
    assert ">>> " in documentation
    assert "Raises:" in documentation
