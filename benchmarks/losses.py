"""Log-probabilities and KL in chunks, beside autograd on the whole logits: time and peak memory.

    python benchmarks/losses.py
    python benchmarks/losses.py --positions 4096 --words 128256 --dtype bfloat16 --device cuda

Forward and backward of the loss alone. On a CPU time is the process's own on one thread. Memory is the peak of bytes of
tensors beside the logits that are given, in tensors of their size.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import biasunlearn_trainer  # noqa: F401  before transformers: mends torchvision beside a torch for the CPU

import torch  # isort: skip
from rounds import interleaved, ratio
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from biasunlearn_trainer.losses import token_kl, token_log_probs
from biasunlearn_trainer.plan.meter import TensorBytes
from biasunlearn_trainer.saliency.distribution import markdown_table

CHUNK = 64  # positions


def checkpointed(loss: Callable[..., Tensor], policy: Tensor, *others: Tensor) -> Tensor:
    """The plain formula chunk by chunk, each computed once more in the backward pass."""
    parts = zip(*(tensor.split(CHUNK) for tensor in (policy, *others)), strict=True)
    return torch.cat([checkpoint(loss, *part, use_reentrant=False) for part in parts])


def ways(policy: Tensor, reference: Tensor, targets: Tensor) -> dict[tuple[str, str], Callable[[], None]]:
    """By loss and way, a forward and backward pass."""

    def plain_kl(policy: Tensor, reference: Tensor) -> Tensor:
        return token_kl(policy, reference, fused=False)

    def plain_logps(policy: Tensor, targets: Tensor) -> Tensor:
        return token_log_probs(policy, targets, fused=False)

    losses = {
        ("KL", "autograd"): lambda: plain_kl(policy, reference),
        ("KL", "checkpointed chunks"): lambda: checkpointed(plain_kl, policy, reference),
        ("KL", "own gradient, chunks"): lambda: token_kl(policy, reference),
        ("log-probabilities", "autograd"): lambda: plain_logps(policy, targets),
        ("log-probabilities", "checkpointed chunks"): lambda: checkpointed(plain_logps, policy, targets),
        ("log-probabilities", "own gradient, chunks"): lambda: token_log_probs(policy, targets),
    }

    def step(loss: Callable[[], Tensor]) -> None:
        loss().sum().backward()
        policy.grad = None

    return {key: lambda loss=loss: step(loss) for key, loss in losses.items()}


def peak(way: Callable[[], None], given: list[Tensor], device: str) -> float:
    """Bytes beside the given tensors, in tensors of the first one's size."""
    if device == "cpu":
        with TensorBytes(*given) as meter:
            before = meter.now
            way()
        return (meter.peak - before) / given[0].nbytes
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    way()
    return (torch.cuda.max_memory_allocated() - before) / given[0].nbytes


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--words", type=int, default=32_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (arguments.positions, arguments.words)
    make = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    policy, reference = torch.randn(shape, **make).requires_grad_(), torch.randn(shape, **make)
    targets = torch.randint(arguments.words, shape[:1], device=arguments.device)
    cases = ways(policy, reference, targets)
    times = interleaved(cases, arguments.rounds, arguments.device)
    rows = []
    for (loss, way), work in cases.items():
        cells = [loss, way, f"{1000 * statistics.median(times[loss, way].values()):.0f}"]
        cells += [str(ratio(times[loss, way], times[loss, "autograd"]))]
        rows.append([*cells, f"{peak(work, [policy, reference, targets], arguments.device):.1f}"])
    print(markdown_table(["loss", "way", "ms", "/ autograd", "peak beside the logits"], rows))


if __name__ == "__main__":
    main()
