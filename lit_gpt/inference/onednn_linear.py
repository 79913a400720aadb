"""Linear layers with weights in the layout of oneDNN, PyTorch's library for products on a CPU: fp32, bf16, int8.

A weight reordered once into oneDNN's blocks is read at twice the speed of `F.linear`. CPU only.

Axes: I inputs, O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_gpt.inference.quantize import quantize_rows

_ROUND = 1.5 * 2**23
"""Added to a small fp32 number it leaves the nearest integer in the low bits of the sum, in two's complement."""


class OneDNNLinear(nn.Module):
    """A linear layer with its fp32 or bf16 weight in oneDNN's blocked layout."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.bias = linear.bias
        # The second argument is the number of rows expected: one, since that is where the layout matters most.
        self._weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self._linear = torch.ops.mkldnn._linear_pointwise.default

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O)."""
        return self._linear(x, self._weight, self.bias, "none", [], "")


class OneDNNInt8Linear(nn.Module):
    """`KernelInt8Linear` by PyTorch's own products, which need 2 to 3 times as long.

    The weight is held twice: as it is, which oneDNN reads fastest for one row, and in blocks for more.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_rows(linear.weight.detach().float())
        bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach().float()
        self._n_in = linear.in_features
        self.bias = bias  # (O,)
        self.scale = scale.squeeze(1) / 127**2  # (O,), of weights and inputs
        self._weight = weight.t()  # (I, O), a view: every output's weights are contiguous
        self._blocked = torch.ops.onednn.qlinear_prepack(weight, [16, weight.size(1)])
        # oneDNN's blocked product reads unsigned rows: 128 is added to them, and this subtracts it again
        self._offset = -128.0 * weight.sum(1) * self.scale
        self._zero_points = torch.zeros(len(weight), dtype=torch.int32)
        self._product = torch.ops.onednn.qlinear_pointwise.default
        self._round = torch.tensor(_ROUND)

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O). A row of zeros divides zero by zero, and is multiplied by zero in the end."""
        largest = x.abs().amax(-1, True)  # (…, 1); the norm of that name takes ten times as long
        if x.numel() == self._n_in:
            q = torch.addcdiv(self._round, x, largest, value=127).view(torch.int32).to(torch.int8)
            y = torch._int_mm(q.view(1, -1), self._weight) * self.scale
        else:
            q = (x * (127 / largest)).add_(_ROUND + 128).view(torch.int32).to(torch.uint8)
            y = self._blocked_product(q)
        return torch.addcmul(self.bias, y, largest)

    def _blocked_product(self, q: Tensor) -> Tensor:
        """(…, I) unsigned rows → their (…, O) scaled products."""
        return self._product(
            q, 1.0, 0, self._blocked, self.scale, self._zero_points, self._offset, 1.0, 0, torch.float32, "none", [], ""
        )
