"""The table of linear layers, which says what is used when: by device, weights and what the machine has.

With few rows to multiply, most of the time goes into reading the weight from memory. Our kernels read it once and in
order; oneDNN reads it at twice the speed of `F.linear`; int8 quarters fp32's traffic, and int4 halves that.
"""

from __future__ import annotations

from collections.abc import Set
from typing import NamedTuple

import torch
from torch import nn

from lit_gpt.inference import native
from lit_gpt.inference.kernel_linear import KernelBf16Linear, KernelInt4Linear, KernelInt8Linear, KernelLinear
from lit_gpt.inference.onednn_linear import OneDNNInt8Linear, OneDNNLinear
from lit_gpt.inference.quantize import GROUP, WeightOnlyInt4Linear, WeightOnlyInt8Linear


class Rule(NamedTuple):
    """A row of the table.

    Attributes:
        device: type of the weight's device; None for any.
        weights: `int4`, `int8`, `bf16`, `fp32`; None for any.
        needs: what must be there, see `available`.
        layer: the class that replaces `nn.Linear`; `nn.Linear` itself where nothing is faster.
    """

    device: str | None
    weights: tuple[str, ...] | None
    needs: tuple[str, ...]
    layer: type[nn.Module]


LINEAR_LAYERS = (  # the first row that fits
    # device weights          needs                           layer
    Rule("cpu", ("int4",), ("kernels", "whole groups"), KernelInt4Linear),
    Rule(None, ("int4",), ("whole groups",), WeightOnlyInt4Linear),
    Rule("cpu", ("int8", "int4"), ("kernels",), KernelInt8Linear),
    # Without VNNI oneDNN's products of bytes saturate in 16 bits; of a single input they are wrong (PyTorch 2.13).
    Rule("cpu", ("int8", "int4"), ("oneDNN", "VNNI", "two inputs"), OneDNNInt8Linear),
    Rule(None, ("int8", "int4"), (), WeightOnlyInt8Linear),
    Rule("cpu", ("fp32",), ("kernels",), KernelLinear),
    Rule("cpu", ("bf16",), ("kernels",), KernelBf16Linear),
    Rule("cpu", ("fp32", "bf16"), ("oneDNN",), OneDNNLinear),
    Rule(None, None, (), nn.Linear),
)

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def fast_linear(linear: nn.Linear, weights: str | None = None) -> nn.Module:
    """The fastest form of `linear` on its device, with weights of that kind or as they are; maybe `linear` itself."""
    weights = weights or _DTYPES.get(linear.weight.dtype, "other")
    layer = linear_class(linear.weight.device.type, weights, available(linear))
    return linear if layer is nn.Linear else layer(linear)


def linear_class(device: str, weights: str, available: Set[str]) -> type[nn.Module]:
    """The class that the table has for this device, these weights and what is there."""
    return next(
        rule.layer
        for rule in LINEAR_LAYERS
        if rule.device in (None, device)
        and (rule.weights is None or weights in rule.weights)
        and available >= set(rule.needs)
    )


def available(linear: nn.Linear) -> set[str]:
    """What the rules may need, and this machine (and `linear`) has."""
    found = {
        "kernels": native.load() is not None,
        "oneDNN": torch.backends.mkldnn.is_available(),
        "VNNI": torch.cpu._is_vnni_supported(),
        "two inputs": linear.in_features > 1,
        "whole groups": linear.in_features % GROUP == 0,
    }
    return {name for name, there in found.items() if there}
