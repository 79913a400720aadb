"""Weights in int8 with one scale for each row, and the linear layer that widens them again to multiply.

Axes: I inputs, O outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(O, I) → int8 (O, I) and the largest magnitude of each row (O, 1): weight ≈ int8 · largest / 127."""
    largest = weight.abs().amax(1, keepdim=True)
    return (weight * (127 / largest.clamp(min=torch.finfo(weight.dtype).tiny))).round().to(torch.int8), largest


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
