"""Linear layers laid out for inference on a CPU, in fp32, bf16 or int8, and all blocks of a GPT as one call.

With few rows to multiply, reading the weight from memory is what takes the time. `StreamedLinear` and `Int8Linear` read
it once, in order, through our own kernels; where those are not to be had, a weight reordered once into oneDNN's blocks
still comes at twice the speed of `F.linear`. int8 quarters fp32's traffic.

Axes: M rows, K inputs, N outputs.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.inference import native as kernels
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.kv_cache import CacheStep

_ROUND = 1.5 * 2**23
"""Added to a small fp32 number it leaves the nearest integer in the low bits of the sum, in two's complement."""

_SMALL = 1 << 18
"""Multiplications that are done before another thread has woken up."""

_ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "relu2", "swiglu")
"""In the order of kernels.cpp."""


class StreamedLinear(nn.Module):
    """A linear layer of our kernels in fp32, which shares its weight with the layer that it is made from.

    What a row gives depends on no other row, to the last bit.
    """

    def __init__(self, linear: nn.Linear, library: ctypes.CDLL) -> None:
        super().__init__()
        self.weight = linear.weight.detach().float().contiguous()  # (N, K)
        self.bias = None if linear.bias is None else linear.bias.detach().float().contiguous()
        n_out, n_in = self.weight.shape
        self.layout = kernels.Linear(self.weight.data_ptr(), None, None, _address(self.bias), n_in, n_out)
        self._product = library.linear_layer

    def forward(self, x: Tensor) -> Tensor:
        """(…, K) → (…, N), fp32."""
        layout = self.layout
        rows = x.numel() // layout.K
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], layout.N))
        room = self._room(rows)
        threads = _threads(rows * layout.K * layout.N)
        self._product(ctypes.byref(layout), x.data_ptr(), y.data_ptr(), _address(room), rows, threads)
        return y

    def _room(self, rows: int) -> Tensor | None:
        return None


class Int8Linear(StreamedLinear):
    """The same in int8: one scale for each weight row, one for each input row, found as it comes.

    Sums of products are exact integers and every scale belongs to one row.
    """

    def __init__(self, linear: nn.Linear, library: ctypes.CDLL) -> None:
        super().__init__(linear, library)
        self.weight, scale = quantize_rows(self.weight)
        self.scale = scale.squeeze(1) / 127  # (N,)
        self._offset = 128 * self.weight.sum(1, dtype=torch.int32)  # inputs are moved by 128: bytes without a sign
        self.layout.W = self.weight.data_ptr()
        self.layout.scale = self.scale.data_ptr()
        self.layout.offset = self._offset.data_ptr()

    def _room(self, rows: int) -> Tensor | None:
        return torch.empty(rows * (self.layout.K + 4), dtype=torch.uint8)


class BlockDecoder:
    """All blocks of a GPT for one new token in each row, as one call of our kernels: `GPT.forward` uses it if it can.

    An operation of PyTorch's costs microseconds however little it does, and a block is made of sixty.

    Attributes:
        cache_dtype: fp32, or with weights in int8 bf16: at sixteen rows the cache is read as long as the weights.
    """

    def __init__(self, model: GPT, library: ctypes.CDLL) -> None:
        config = model.config
        self.cache_dtype = torch.bfloat16 if isinstance(model.lm_head, Int8Linear) else torch.float32
        blocks = [block for block in model.h if isinstance(block, Block)]
        self._rotation = None if model.rope is None else model.rope.table.contiguous()
        self._stack = kernels.Stack(
            (kernels.Layer * config.n_layer)(*map(_layer, blocks)),
            _address(self._rotation),
            config.n_layer,
            config.n_embd,
            config.n_head,
            config.kv_heads,
            config.head_size,
            config.mlp_size,
            _ACTIVATIONS.index(config.mlp),
            config.norm == "rmsnorm",
            config.norm_eps,
        )
        attended = config.n_head * config.head_size
        widest = max(config.n_embd, attended)
        self._floats = widest + attended + 2 * config.kv_heads * config.head_size + config.mlp_size  # for each row
        self._bytes = max(widest, config.mlp_size) + 4
        self._n_position = config.block_size
        self._work = library.decode

    def supports(self, cache: CacheStep) -> bool:
        """Whether the cache is of a dtype, and every place within the positions, that the kernels know."""
        return cache.stores[0].dtype in (torch.float32, torch.bfloat16) and max(cache.starts) < self._n_position

    def __call__(self, x: Tensor, cache: CacheStep) -> Tensor:
        """(B, 1, C) → (B, 1, C), fp32; writes this token's keys and values."""
        keys, values = cache.stores
        rows, lengths = torch.tensor(cache.slots), torch.tensor(cache.starts)
        threads, weights = torch.get_num_threads(), max(cache.starts) + 4
        n_row = len(rows)
        room = torch.empty(n_row * self._floats + threads * weights + (n_row * self._bytes + 3) // 4)
        x = x.clone(memory_format=torch.contiguous_format)
        layer, row, head = keys.stride()[:3]
        layout = kernels.Cache(keys.data_ptr(), values.data_ptr(), layer, row, head, keys.dtype == torch.bfloat16)
        stack = ctypes.byref(self._stack)
        addresses = x.data_ptr(), rows.data_ptr(), lengths.data_ptr(), room.data_ptr()
        self._work(stack, ctypes.byref(layout), *addresses, weights, n_row, threads)
        return x


def _layer(block: Block) -> kernels.Layer:
    attn, mlp = block.attn, block.mlp
    gate = kernels.Linear() if mlp.c_gate is None else mlp.c_gate.layout
    return kernels.Layer(
        _address(block.ln_1.weight),
        _address(getattr(block.ln_1, "bias", None)),
        _address(block.ln_2.weight),
        _address(getattr(block.ln_2, "bias", None)),
        None if attn.q_norm is None else _address(attn.q_norm.weight),
        None if attn.k_norm is None else _address(attn.k_norm.weight),
        attn.c_attn.layout,
        attn.c_proj.layout,
        mlp.c_fc.layout,
        gate,
        mlp.c_proj.layout,
    )


def _address(tensor: Any) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _threads(products: int) -> int:
    return 1 if products < _SMALL else torch.get_num_threads()


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


class PackedInt8Linear(nn.Module):
    """`Int8Linear` by PyTorch's own products, which take 2 to 3 times as long. CPU only.

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


def pack(model: GPT, int8: bool) -> None:
    """Replace every linear layer of `model` by its packed form, one at a time so that memory stays low."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, _packed(child, int8))
    library = kernels.load()
    if library is not None and isinstance(model.lm_head, StreamedLinear):
        model.decode_kernel = BlockDecoder(model, library)


def _packed(linear: nn.Linear, int8: bool) -> nn.Module:
    if linear.weight.device.type != "cpu":
        return WeightInt8Linear(linear) if int8 else linear
    library, dtype, onednn = kernels.load(), linear.weight.dtype, torch.backends.mkldnn.is_available()
    if int8:
        if library is not None:
            return Int8Linear(linear, library)
        # Without VNNI oneDNN's products of bytes saturate in 16 bits; of a single input they are wrong (PyTorch 2.13).
        capable = onednn and torch.cpu._is_vnni_supported() and linear.in_features > 1
        return PackedInt8Linear(linear) if capable else WeightInt8Linear(linear)
    if library is not None and dtype == torch.float32:
        return StreamedLinear(linear, library)
    return PackedLinear(linear) if onednn and dtype in (torch.float32, torch.bfloat16) else linear
