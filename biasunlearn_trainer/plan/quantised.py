"""Linear layers in 4 and 8 bits as bitsandbytes keeps them: their bytes and what a pass unpacks, without its kernels.

bitsandbytes itself wants a GPU for a model that is never loaded; sizes need none.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.quantizers.base import get_keys_to_not_convert

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share a scale in NF4 and FP4, and scales that share one where they are quantised too (bitsandbytes)."""


class PackedLinear(nn.Linear):
    """A linear layer whose weight is packed; frozen, as quantised weights are.

    Args:
        linear: the layer to stand in for.
        bits: 4 or 8.
        nested: whether the scales of the 4-bit weights are quantised too.
        dtype: what is computed in; 8-bit products are float16.
    """

    def __init__(self, linear: nn.Linear, bits: int, nested: bool, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        size, self.dtype = linear.weight.numel(), dtype if bits == 4 else torch.float16
        packed = torch.empty(-(-size // 2), 1, dtype=torch.uint8) if bits == 4 else torch.empty(size, dtype=torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        for number, scale in enumerate(_scales(size, self.out_features, bits, nested)):
            self.register_buffer(f"scale_{number}", scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """(..., out) of (..., in)."""
        bias = None if self.bias is None else self.bias.to(self.dtype)
        shape = (self.out_features, self.in_features)
        return _PackedProduct.apply(inputs.to(self.dtype), self.weight, bias, shape).to(inputs.dtype)


def _scales(size: int, rows: int, bits: int, nested: bool) -> list[Tensor]:
    if bits == 8:
        return [torch.empty(rows, dtype=torch.float32)]
    blocks = -(-size // BLOCK)
    if not nested:
        return [torch.empty(blocks, dtype=torch.float32)]
    return [torch.empty(blocks, dtype=torch.uint8), torch.empty(-(-blocks // NESTED_BLOCK), dtype=torch.float32)]


class _PackedProduct(torch.autograd.Function):
    """The weight is unpacked in each pass and kept in none; inputs need not be kept, as it gets no gradient."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, bias: Tensor | None, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.shape = shape
        return functional.linear(inputs, inputs.new_empty(shape), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return gradient @ gradient.new_empty(ctx.shape), None, None, None


def pack_linears(model: nn.Module, bits: int, nested: bool, dtype: torch.dtype) -> None:
    """Exchange the linear layers that `from_pretrained` would quantise.

    Args:
        model: a transformers model; changed in place. Its head stays whole, as bitsandbytes leaves it.
        bits: 4 or 8.
        nested: whether scales are quantised too.
        dtype: what is computed in.
    """
    skipped = get_keys_to_not_convert(model)
    chosen = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(name == key or name.startswith(f"{key}.") for key in skipped)
    ]
    for name in chosen:
        model.set_submodule(name, PackedLinear(model.get_submodule(name), bits, nested, dtype))
    model.requires_grad_(False)
    model.is_quantized = True
    # What the Trainer asks before it trains a quantised model.
    model.hf_quantizer = SimpleNamespace(
        is_trainable=True, quantization_config=SimpleNamespace(quant_method="bitsandbytes")
    )
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = bits == 4, bits == 8
