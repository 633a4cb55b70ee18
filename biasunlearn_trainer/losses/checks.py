"""Checks on the arguments of a loss: they read shapes and Python numbers only, so they never wait for a GPU."""

import torch


def check_same_shape(**tensors: torch.Tensor) -> None:
    """Refuse tensors whose shapes differ, which broadcasting would turn into wrong numbers without an error.

    Raises:
        ValueError: names every tensor with its shape.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"`{name}` {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(f"Expected equal shapes, got {shapes}. Reshape them; a loss never broadcasts.")


def check_per_sequence(**tensors: torch.Tensor) -> None:
    """Require one value per sequence: shape (B,), the same B everywhere.

    Raises:
        ValueError: names the tensor that is not (B,), or all of them where B differs.
    """
    for name, tensor in tensors.items():
        if tensor.ndim != 1:
            raise ValueError(
                f"`{name}` must hold one value per sequence, shape (B,), got {tuple(tensor.shape)}. "
                "Sum token log-probabilities with `sequence_sum`, or squeeze the extra dimension."
            )
    check_same_shape(**tensors)


def check_beta(beta: float, paper_value: float) -> None:
    """Require a positive inverse temperature.

    Raises:
        ValueError: also for NaN; it offers `paper_value`.
    """
    if not beta > 0:
        raise ValueError(f"`beta` must be positive, got {beta}. Use {paper_value}, the paper's value.")
