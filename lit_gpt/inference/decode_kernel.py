"""The fused step of all blocks of a GPT for the new tokens of each slot, as one call of the C++ kernels. CPU only.

Axes: B slots in one step, T new tokens of each, C `n_embd`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.inference import native
from lit_gpt.inference.adapter_bank import AdapterBank, AdapterLinear
from lit_gpt.inference.kernel_linear import KernelLinear
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.kv_cache import CacheStep

_CACHE_DTYPES = (torch.float32, torch.bfloat16)
_BLOCK: dict[str, Any] = {
    "block_norm": "pre",
    "parallel_residual": False,
    "norm_unit_offset": False,
    "rotary_dim": None,
    "rope_local_theta": None,
    "qk_norm_full": False,
    "attn_scale": None,
}
"""The values of the config with which a block is the one that the kernels compute."""


class FusedDecode(nn.Module):
    """All blocks of a GPT for the new tokens of each slot: `GPT.forward` uses it as the `DecodeKernel` where it can.

    An operation of PyTorch's costs microseconds however little it does, and a block is made of sixty; with many tokens
    those between the products take a fifth of the time. A token's result is the same to the last bit in whatever pieces
    its sequence is read, and whatever the other slots hold. It is a module without parameters, so that it learns when
    those of the model are cast or moved: their addresses are read again.

    Attributes:
        cache_dtype: fp32, or with smaller weights bf16: at sixteen slots the cache is read as long as the weights.
        adapters: of the model, which the kernels do not know: a pass with any goes layer by layer.
    """

    def __init__(self, model: GPT) -> None:
        """Describe `model`, whose linear layers are those of the kernels; check `fusible` first.

        Raises:
            native.Unavailable: where there are no kernels.
            ValueError: if a tensor of the model has not the shape that its config says, or is not on the CPU.
        """
        super().__init__()
        library = native.require()
        self.adapters: AdapterBank | None = None
        self._config = config = model.config
        self.cache_dtype = torch.float32 if type(model.lm_head) is KernelLinear else torch.bfloat16
        self._blocks = [block for block in model.h if isinstance(block, Block)]  # a plain list: they stay the model's
        self._rope = None if model.rope is None else model.rope.table
        self._activation = _activation_index(library, config)
        self._cache_shape = config.n_layer, config.kv_heads, config.head_size
        self._scratch_bytes = library.decode_scratch_bytes
        self._decode = library.decode
        self._stack: native.Stack | None = self._describe()

    @staticmethod
    def fusible(model: GPT) -> bool:
        """Whether the kernels are there, all linear layers are theirs, and they have all that the blocks do."""
        library = native.load()
        if library is None or not isinstance(model.lm_head, KernelLinear):
            return False
        if any(getattr(model.config, name) != value for name, value in _BLOCK.items()):
            return False
        blocks = [block for block in model.h if isinstance(block, Block)]
        layers = [layer for block in blocks for layer in _linear_layers(block).values()]
        ours = all(layer is None or isinstance(layer, KernelLinear) for layer in layers)
        return ours and len(blocks) == model.config.n_layer and _activation_index(library, model.config) >= 0

    def supports(self, cache: CacheStep) -> bool:
        """Whether the kernels have the cache's dtype and layout, and every new token's position is the model's.

        They know no sliding window; until a sequence is longer than it, there is nothing that it would hide.
        """
        if self.adapters is not None and self.adapters.active:
            return False
        keys, values = cache.stores
        is_known = keys.dtype in _CACHE_DTYPES and keys.is_contiguous() and values.is_contiguous()
        longest = min(self._config.block_size, self._config.sliding_window or self._config.block_size)
        return is_known and max(cache.starts) + cache.n_new <= longest

    def __call__(self, x: Tensor, cache: CacheStep) -> Tensor:
        """(B, T, C) → (B, T, C), in fp32 whatever the dtype of x, and returned in that; writes the new keys and values.

        Raises:
            ValueError: for a shape, dtype, device or slot with which memory would be used that is not the cache's.
        """
        self._check(x, cache)
        if self._stack is None:
            self._stack = self._describe()
        keys, values = cache.stores
        numbers = torch.tensor((cache.slots, cache.starts), dtype=torch.long)  # (2, B), one operation
        n_slots, n_new, stack = len(cache.slots), cache.n_new, ctypes.byref(self._stack)
        threads = torch.get_num_threads()
        slots = numbers.data_ptr()
        lengths = slots + n_slots * numbers.itemsize
        scratch = torch.empty(self._scratch_bytes(stack, lengths, n_slots, n_new, threads), dtype=torch.uint8)
        dtype, contiguous = x.dtype, torch.contiguous_format
        is_fp32 = dtype is torch.float32
        y = x.clone(memory_format=contiguous) if is_fp32 else x.to(torch.float32, memory_format=contiguous)
        strides = keys.stride()[:3]  # of layers, slots and heads
        layout = native.CacheLayout(keys.data_ptr(), values.data_ptr(), *strides, keys.dtype is torch.bfloat16)
        addresses = y.data_ptr(), slots, lengths, scratch.data_ptr()
        self._decode(stack, ctypes.byref(layout), *addresses, n_slots, n_new, threads)
        return y if is_fp32 else y.to(dtype)

    def _check(self, x: Tensor, cache: CacheStep) -> None:
        """Raise ValueError where the kernels would read or write what is not x's or the cache's."""
        (keys, values), slots, starts = cache.stores, cache.slots, cache.starts
        n_layer, n_slots, n_heads, capacity, width = shape = keys.shape
        fits = (
            type(x) is Tensor
            and x.is_cpu
            and x.shape == (len(slots), cache.n_new, self._config.n_embd)
            and (n_layer, n_heads, width) == self._cache_shape
            and values.shape == shape
            and values.dtype is keys.dtype
            and keys.is_cpu
            and values.is_cpu
            and self.supports(cache)
            and native.is_stored(keys)
            and native.is_stored(values)
            and len(starts) == len(slots)
            and min(slots) >= 0
            and max(slots) < n_slots
            and min(starts) >= 0
            and max(starts) + cache.n_new <= capacity
        )
        if not fits:
            found = f"{x.dtype} {tuple(x.shape)} on {x.device} and keys {keys.dtype} {tuple(keys.shape)}"
            raise ValueError(f"the decoding kernels cannot use {found} for slots {slots} of {starts} tokens")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FusedDecode:
        """The model's parameters are being replaced, before or after this: describe it anew when it is next used."""
        super()._apply(fn, recurse)
        self._stack = None
        return self

    def _describe(self) -> native.Stack:
        """The model as it is now, in fp32."""
        config = self._config
        held: list[Tensor] = []
        rotation = (config.block_size, 2, config.head_size // 2)
        stack = native.Stack(
            blocks=(native.BlockLayout * config.n_layer)(
                *(self._describe_block(block, held) for block in self._blocks)
            ),
            rotation=_pointer(self._rope, "the rotary table", rotation, held),
            n_layer=config.n_layer,
            C=config.n_embd,
            H=config.n_head,
            K=config.kv_heads,
            D=config.head_size,
            F=config.mlp_size,
            activation=self._activation,
            rmsnorm=config.norm == "rmsnorm",
            eps=config.norm_eps,
        )
        stack.held = held
        return stack

    def _describe_block(self, block: Block, held: list[Tensor]) -> native.BlockLayout:
        config = self._config
        norms = {"ln_1": block.ln_1, "ln_2": block.ln_2, "q_norm": block.attn.q_norm, "k_norm": block.attn.k_norm}
        described = native.BlockLayout()
        for name, norm in norms.items():
            shape = (config.n_embd if name.startswith("ln") else config.head_size,)
            setattr(described, name, _pointer(getattr(norm, "weight", None), name, shape, held))
            if name.startswith("ln"):
                setattr(described, f"{name}_bias", _pointer(getattr(norm, "bias", None), name, shape, held))
        heads = (config.n_head + 2 * config.kv_heads) * config.head_size
        outputs = {"c_attn": heads, "c_fc": config.mlp_size, "c_gate": config.mlp_size}
        inputs = {"attn_c_proj": config.n_head * config.head_size, "mlp_c_proj": config.mlp_size}
        for name, layer in _linear_layers(block).items():
            if layer is None:
                continue
            found = layer.layout.O, layer.layout.I
            if found != (outputs.get(name, config.n_embd), inputs.get(name, config.n_embd)):
                raise ValueError(f"{name} has the shape {found}, which is not the config's")
            setattr(described, name, layer.layout)
        return described


def _pointer(tensor: Tensor | None, name: str, shape: tuple[int, ...], held: list[Tensor]) -> int | None:
    """The address of the tensor in fp32, which is added to `held`; None for null."""
    if tensor is None:
        return None
    held.append(tensor.detach().float().contiguous())
    return native.pointer(held[-1], name, shape)


def _linear_layers(block: Block) -> dict[str, Any]:
    """The linear layers of a block by the kernels' names; None for a gate that is not there."""
    attn, mlp = block.attn, block.mlp
    layers: dict[str, Any] = {
        "c_attn": attn.c_attn,
        "attn_c_proj": attn.c_proj,
        "c_fc": mlp.c_fc,
        "c_gate": mlp.c_gate,
        "mlp_c_proj": mlp.c_proj,
    }
    return {name: layer.base if isinstance(layer, AdapterLinear) else layer for name, layer in layers.items()}


def _activation_index(library: ctypes.CDLL, config: GPTConfig) -> int:
    """The number of the activation in the kernels, or -1 if they have none of that name."""
    return library.activation_index(config.mlp.encode())
