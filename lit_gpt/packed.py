"""Linear layers laid out for inference: weights packed once for the CPU's kernels, in fp32, bf16 or int8.

`F.linear` reads a plain weight at half of the memory's speed when it has one row to multiply; a weight reordered once
into oneDNN's blocks comes at twice that. int8 halves bf16's traffic again.

Axes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ROUND = 1.5 * 2**23
"""Added to a small fp32 number it leaves the nearest integer in the low bits of the sum, in two's complement."""


class PackedLinear(nn.Module):
    """A linear layer with its fp32 or bf16 weight in oneDNN's blocked layout. CPU only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        # The second argument is the number of rows expected: one, since that is where the layout matters most.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N)."""
        return self._linear(x, self._weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer in int8: one scale for each weight row, one for each input row, found as it comes. CPU only.

    Sums of products are exact integers and every scale belongs to one row, so that no row depends on its neighbours.
    The weight is held twice: as it is, which oneDNN reads fastest for one row, and in blocks for more.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach().float())
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
        self._n_in = linear.in_features
        self.bias = bias  # (N,)
        self.scale = scale.squeeze(1) / 127**2  # (N,), of weights and inputs
        self._weight = weight.t()  # (K, N), a view: every output's weights stand together
        self._packed = torch.ops.onednn.qlinear_prepack(weight, [16, weight.size(1)])
        # oneDNN's packed product takes unsigned rows: 128 is added to them, and comes off again here
        self._offset = -128.0 * weight.sum(1) * self.scale
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self._product = torch.ops.onednn.qlinear_pointwise.default
        self._round = torch.tensor(_ROUND)

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N). A row of zeros divides zero by zero, and is multiplied by zero in the end."""
        largest = x.abs().amax(-1, True)  # (…, 1); the norm of that name takes ten times as long
        if x.numel() == self._n_in:
            q = torch.addcdiv(self._round, x, largest, value=127).view(torch.int32).to(torch.int8)
            y = torch._int_mm(q.view(1, -1), self._weight) * self.scale
        else:
            q = (x * (127 / largest)).add_(_ROUND + 128).view(torch.int32).to(torch.uint8)
            y = self._packed_product(q)
        return torch.addcmul(self.bias, y, largest)

    def _packed_product(self, q: Tensor) -> Tensor:
        """(…, K) unsigned rows → their (…, N) scaled products."""
        return self._product(
            q, 1.0, 0, self._packed, self.scale, self._zero_points, self._offset, 1.0, 0, torch.float32, "none", [], ""
        )


class WeightInt8Linear(nn.Module):
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
        """(…, K) → (…, N)."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) → int8 (N, K) and the largest magnitude of each row (N, 1): weight ≈ int8 · largest / 127."""
    largest = weight.abs().amax(1, keepdim=True)
    return (weight * (127 / largest.clamp(min=torch.finfo(weight.dtype).tiny))).round().to(torch.int8), largest


def pack(model: nn.Module, int8: bool) -> None:
    """Replace every linear layer below `model` by its packed form, one at a time so that memory stays low."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _packed(child, int8))


def _packed(linear: nn.Linear, int8: bool) -> nn.Module:
    on_cpu = linear.weight.device.type == "cpu"
    if int8:
        # Without VNNI oneDNN's products of bytes saturate in 16 bits; of a single input they are wrong (PyTorch 2.13).
        capable = on_cpu and torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()
        fast = capable and linear.in_features > 1
        return Int8Linear(linear) if fast else WeightInt8Linear(linear)
    if on_cpu and torch.backends.mkldnn.is_available() and linear.weight.dtype in (torch.float32, torch.bfloat16):
        return PackedLinear(linear)
    return linear
