"""The fused step of all blocks of a GPT for one new token in each slot, as one call of the C++ kernels. CPU only.

Axes: B slots in one step, C `n_embd`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from lit_gpt.inference import native
from lit_gpt.inference.kernel_linear import KernelInt8Linear, KernelLinear
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT, Block
from lit_gpt.model.kv_cache import CacheStep


class FusedDecode:
    """All blocks of a GPT for one new token in each slot: `GPT.forward` uses it as the `DecodeKernel` where it can.

    An operation of PyTorch's costs microseconds however little it does, and a block is made of sixty.

    Attributes:
        cache_dtype: fp32, or with weights in int8 bf16: at sixteen slots the cache is read as long as the weights.
    """

    def __init__(self, model: GPT) -> None:
        """Describe `model`, whose linear layers are those of the kernels; check `fusible` first."""
        library = native.require()
        config = model.config
        self.cache_dtype = torch.bfloat16 if isinstance(model.lm_head, KernelInt8Linear) else torch.float32
        blocks = [block for block in model.h if isinstance(block, Block)]
        self._rotation = None if model.rope is None else model.rope.table.contiguous()
        self._stack = native.Stack(
            blocks=(native.Block * config.n_layer)(*map(_describe, blocks)),
            rotation=native.address(self._rotation),
            n_layer=config.n_layer,
            C=config.n_embd,
            H=config.n_head,
            K=config.kv_heads,
            D=config.head_size,
            F=config.mlp_size,
            activation=_activation_index(library, config),
            rmsnorm=config.norm == "rmsnorm",
            eps=config.norm_eps,
        )
        self._n_positions = config.block_size
        self._scratch_bytes = library.decode_scratch_bytes
        self._decode = library.decode

    @staticmethod
    def fusible(model: GPT) -> bool:
        """Whether the kernels are there, the linear layers are theirs, and the activation is one that they have."""
        library = native.load()
        if library is None or not isinstance(model.lm_head, KernelLinear):
            return False
        return _activation_index(library, model.config) >= 0

    def supports(self, cache: CacheStep) -> bool:
        """Whether the kernels have the cache's dtype, and every new token's position is one of the model's."""
        return cache.stores[0].dtype in (torch.float32, torch.bfloat16) and max(cache.starts) < self._n_positions

    def __call__(self, x: Tensor, cache: CacheStep) -> Tensor:
        """(B, 1, C) → (B, 1, C), fp32; writes the new tokens' keys and values."""
        keys, values = cache.stores
        slots, lengths = torch.tensor(cache.slots), torch.tensor(cache.starts)
        n_slots, threads, stack = len(slots), torch.get_num_threads(), ctypes.byref(self._stack)
        scratch = torch.empty(self._scratch_bytes(stack, lengths.data_ptr(), n_slots, threads), dtype=torch.uint8)
        x = x.clone(memory_format=torch.contiguous_format)
        strides = keys.stride()[:3]  # of layers, slots and heads
        layout = native.KVCache(keys.data_ptr(), values.data_ptr(), *strides, keys.dtype == torch.bfloat16)
        addresses = x.data_ptr(), slots.data_ptr(), lengths.data_ptr(), scratch.data_ptr()
        self._decode(stack, ctypes.byref(layout), *addresses, n_slots, threads)
        return x


def _activation_index(library: ctypes.CDLL, config: GPTConfig) -> int:
    """The number of the activation in the kernels, or -1 if they have none of that name."""
    return library.activation_index(config.mlp.encode())


def _describe(block: Block) -> native.Block:
    attn, mlp = block.attn, block.mlp

    def parameter(norm: nn.Module | None, name: str) -> int | None:
        return native.address(getattr(norm, name, None))

    return native.Block(
        ln_1=parameter(block.ln_1, "weight"),
        ln_1_bias=parameter(block.ln_1, "bias"),
        ln_2=parameter(block.ln_2, "weight"),
        ln_2_bias=parameter(block.ln_2, "bias"),
        q_norm=parameter(attn.q_norm, "weight"),
        k_norm=parameter(attn.k_norm, "weight"),
        c_attn=attn.c_attn.layout,
        attn_c_proj=attn.c_proj.layout,
        c_fc=mlp.c_fc.layout,
        c_gate=native.Linear() if mlp.c_gate is None else mlp.c_gate.layout,
        mlp_c_proj=mlp.c_proj.layout,
    )
