"""Linear layers of our C++ kernels, in fp32, bf16, int8 and int4. CPU only.

Axes: B rows (all axes in front of the last), I inputs, O outputs.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from lit_gpt.inference import native
from lit_gpt.inference.packing import pack_int4, pack_int8
from lit_gpt.inference.quantize import quantize_groups, quantize_rows

_SMALL = 1 << 18
"""Multiplications that are done before another thread has woken up."""


class KernelLinear(nn.Module):
    """A linear layer of our kernels in fp32, which shares its weight with the layer that it is made from.

    The result for a row depends on no other row, to the last bit.

    Attributes:
        layout: its description for the kernels.
    """

    _format = "fp32"
    _needs_scratch = False

    def __init__(self, linear: nn.Linear) -> None:
        """Raises native.Unavailable where there are no kernels, and ValueError for a weight that is not in memory."""
        super().__init__()
        library = native.require()
        self._n_out, self._n_in = n_out, n_in = linear.weight.shape
        self.layout = native.Linear(I=n_in, O=n_out, format=library.format_index(self._format.encode()))
        weight = linear.weight.detach().contiguous()
        native.pointer(weight, "the weight", (n_out, n_in), weight.dtype)  # it is in memory
        self._hold(weight)
        self.bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        if self.bias is not None:
            self.layout.bias = native.pointer(self.bias, "the bias", (n_out,))
        self._forward = library.linear_forward
        self._scratch_bytes = library.linear_scratch_bytes

    def _hold(self, weight: Tensor) -> None:
        """Keep the weight (O, I) in the form that the kernels read, and tell them where it is."""
        self.weight = weight.float()  # (O, I)
        self.layout.weight = native.pointer(self.weight, "the weight", (self._n_out, self._n_in))

    def forward(self, x: Tensor) -> Tensor:
        """(…, I) → (…, O), in fp32 whatever the dtype of x, and returned in that.

        Raises:
            TypeError: for what is no tensor of floating-point numbers on the CPU.
            ValueError: for another shape, or a tensor whose storage has been freed.
        """
        if type(x) is not Tensor or x.dtype is not torch.float32 or not x.is_cpu:
            return self._converted(x)
        x = x.contiguous()
        shape, n_in, n_out = x.shape, self._n_in, self._n_out
        if shape[-1] != n_in or not native.is_stored(x):
            raise ValueError(f"a linear layer of {n_in} inputs got {tuple(shape)}, or its memory is gone")
        n_rows = x.numel() // n_in
        layout = ctypes.byref(self.layout)
        y = x.new_empty((*shape[:-1], n_out))
        scratch = None
        if self._needs_scratch:
            scratch = torch.empty(self._scratch_bytes(layout, n_rows), dtype=torch.uint8)
        threads = 1 if n_rows * n_in * n_out < _SMALL else torch.get_num_threads()
        scratch_address = None if scratch is None else scratch.data_ptr()
        self._forward(layout, x.data_ptr(), y.data_ptr(), scratch_address, n_rows, threads)
        return y

    def _converted(self, x: Tensor) -> Tensor:
        """The same for x of another dtype, as it comes under autocast or in a model that was cast afterwards."""
        if type(x) not in (Tensor, nn.Parameter) or not x.is_cpu or not x.is_floating_point():
            found = f"{type(x).__name__} of {x.dtype} on {x.device}"
            raise TypeError(f"a layer of the CPU kernels needs a tensor of floating-point numbers there, not {found}")
        return self(x.detach().float()).to(x.dtype)


class KernelBf16Linear(KernelLinear):
    """The same with the weight in bf16.

    Products are of fp32 inputs; where the CPU multiplies bf16, inputs are rounded to it. Sums are in fp32.
    """

    _format = "bf16"
    _needs_scratch = True

    def _hold(self, weight: Tensor) -> None:
        self.weight = weight.bfloat16()
        shape = (self._n_out, self._n_in)
        self.layout.weight = native.pointer(self.weight, "the weight", shape, torch.bfloat16)


class KernelInt8Linear(KernelLinear):
    """The same in int8: one scale for each weight row, and one for each input row, computed on the fly.

    Sums of products are exact integers and every scale belongs to one row.
    """

    _format = "int8"
    _needs_scratch = True

    def _hold(self, weight: Tensor) -> None:
        rows, largest = quantize_rows(weight.float())
        self.weight = pack_int8(rows)
        self.scale = largest.squeeze(1) / 127  # (O,)
        self._offset = 128 * rows.sum(1, dtype=torch.int32)  # where inputs are moved by 128: bytes without a sign
        shape, n_out = tuple(self.weight.shape), self._n_out
        self.layout.weight = native.pointer(self.weight, "the weight", shape, torch.int8)
        self.layout.scale = native.pointer(self.scale, "the scale", (n_out,))
        self.layout.offset = native.pointer(self._offset, "the offset", (n_out,), torch.int32)


class KernelInt4Linear(KernelLinear):
    """The same in int4: one scale for each 32 weights of a row, and one in int8 for each input row.

    The sum of a group is an exact integer; groups are added in fp32. Inputs must be whole groups.
    """

    _format = "int4"
    _needs_scratch = True

    def _hold(self, weight: Tensor) -> None:
        groups, scale = quantize_groups(weight.float())
        self.weight, self.scale = pack_int4(groups, scale)
        shape, scales = tuple(self.weight.shape), tuple(self.scale.shape)
        self.layout.weight = native.pointer(self.weight, "the weight", shape, torch.uint8)
        self.layout.scale = native.pointer(self.scale, "the scale", scales, torch.float16)
