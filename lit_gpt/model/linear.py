"""Linear layers whose products in fp32 on a CPU are made by the faster of PyTorch's two libraries, MKL and oneDNN.

`F.linear` and `@` call MKL for fp32, which uses AVX-512 on Intel's CPUs alone: on a Zen 5 it makes 98 GFLOP/s a thread,
oneDNN 215. Within AVX2 the two are equal. Products in bf16 are oneDNN's already.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEAST = 1 << 20
"""Multiplications below which a product is not worth the longer call."""


@functools.cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies faster than MKL in fp32 here. Nothing is timed: a resumed run goes on with the same."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return wide and torch.backends.mkldnn.is_available() and _cpu_vendor() not in (None, "GenuineIntel")


def _cpu_vendor() -> str | None:
    """As the CPU names it; None where that is not to be found out."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), None)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b without a gradient: (…, I), (O, I) of any strides, (O,) or None → (…, O)."""
    if _suits(x, weight):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is to make this product. In compiled code the compiler chooses."""
    both = x.is_cpu and x.dtype == weight.dtype == torch.float32 and not torch.compiler.is_compiling()
    return both and prefers_onednn() and x.numel() * len(weight) >= _LEAST and min(weight.shape) > 1


class BlockLinear(nn.Linear):
    """`nn.Linear`, with products by `product` in training too."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        if not _suits(x, self.weight) or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        y: Tensor = _LinearProduct.apply(x, self.weight, self.bias)
        return y


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.flatten(0, -2)  # (N, O)
        return (
            product(grad, weight.t()) if needs_x else None,
            product(rows.t(), x.flatten(0, -2).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
