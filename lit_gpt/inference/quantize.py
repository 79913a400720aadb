"""Weights in int8 and int4 with their scales, and the linear layers that widen them again to multiply.

Axes: I inputs, O outputs, G groups of 32 inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GROUP = 32
"""Inputs that share a scale in int4."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) → int8 (O, I) and what 127 of them stand for in each row (O, 1): weight ≈ int8 · largest / 127.

    `largest` is the largest sum of two neighbours' magnitudes, inputs 2i and 2i + 1, so that two products with bytes
    without a sign have a sum of at most 255 · 128. 16 bits hold it: without VNNI, x86 adds them so (`vpmaddubsw`), and
    would saturate. PyTorch's `reduce_range` gives up a bit of the other operand for it, this about half a bit of the
    weight.
    """
    largest = F.pad(weight.abs(), (0, weight.size(1) % 2)).unflatten(1, (-1, 2)).sum(2).amax(1, keepdim=True)
    return (weight * (127 / largest.clamp(min=torch.finfo(weight.dtype).tiny))).round().to(torch.int8), largest


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) → uint8 0 … 15 (O, I) and the scale of each group in fp16 (O, G): weight ≈ (uint8 - 8) · scale.

    As GGUF's Q4_0: the weight of largest magnitude in a group becomes -8.
    """
    groups = weight.unflatten(1, (-1, GROUP))  # (O, G, 32)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True))
    limit = torch.finfo(torch.float16).max
    scale = (extreme / -8).clamp(-limit, limit).half()
    unit = scale.float()
    steps = torch.where(unit == 0, 0.0, groups / torch.where(unit == 0, 1.0, unit))
    return (steps.round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1), scale.squeeze(2)


class WeightOnlyInt8Linear(nn.Module):
    """A linear layer whose weight alone is int8, with a scale for each row; it saves memory on any device."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach().float())
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("scale", scale.squeeze(1).to(linear.weight.dtype) / 127, persistent=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


class WeightOnlyInt4Linear(nn.Module):
    """A linear layer whose weight alone is int4, with a scale for each 32 weights; it saves memory on any device.

    Inputs must be whole groups.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        steps, scale = quantize_groups(linear.weight.detach().float())
        low, high = steps.unflatten(1, (-1, 2)).unbind(2)
        self.register_buffer("weight", low | high << 4, persistent=False)  # (O, I / 2)
        self.register_buffer("scale", scale.to(linear.weight.dtype), persistent=False)  # (O, G)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        steps = torch.stack([self.weight & 15, self.weight >> 4], 2).flatten(1).to(x.dtype) - 8
        weight = (steps.unflatten(1, (-1, GROUP)) * self.scale[:, :, None].to(x.dtype)).flatten(1)
        return F.linear(x, weight, self.bias)
