"""Linear layers of our C++ kernels, in fp32 and int8. CPU only.

Axes: B rows (all axes in front of the last), I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from lit_gpt.inference import native
from lit_gpt.inference.quantize import quantize_rows

_SMALL = 1 << 18
"""Multiplications that are done before another thread has woken up."""


class KernelLinear(nn.Module):
    """A linear layer of our kernels in fp32, which shares its weight with the layer that it is made from.

    The result for a row depends on no other row, to the last bit.

    Attributes:
        layout: its description for the kernels.
    """

    def __init__(self, linear: nn.Linear) -> None:
        """Raises native.Unavailable where there are no kernels."""
        super().__init__()
        library = native.require()
        self.weight = linear.weight.detach().float().contiguous()  # (O, I)
        self.bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        n_out, n_in = self.weight.shape
        self.layout = native.Linear(weight=self.weight.data_ptr(), bias=native.address(self.bias), I=n_in, O=n_out)
        self._forward = library.linear_forward
        self._scratch_bytes = library.linear_scratch_bytes

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), fp32."""
        layout = ctypes.byref(self.layout)
        n_in, n_out = self.layout.I, self.layout.O
        n_rows = x.numel() // n_in
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], n_out))
        scratch = torch.empty(self._scratch_bytes(layout, n_rows), dtype=torch.uint8)
        threads = 1 if n_rows * n_in * n_out < _SMALL else torch.get_num_threads()
        self._forward(layout, x.data_ptr(), y.data_ptr(), scratch.data_ptr(), n_rows, threads)
        return y


class KernelInt8Linear(KernelLinear):
    """The same in int8: one scale for each weight row, and one for each input row, computed on the fly.

    Sums of products are exact integers and every scale belongs to one row.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight, scale = quantize_rows(self.weight)
        self.scale = scale.squeeze(1) / 127  # (O,)
        self._offset = 128 * self.weight.sum(1, dtype=torch.int32)  # inputs are moved by 128: bytes without a sign
        self.layout.weight = self.weight.data_ptr()
        self.layout.scale = self.scale.data_ptr()
        self.layout.offset = self._offset.data_ptr()
