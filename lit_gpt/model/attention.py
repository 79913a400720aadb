"""Causal self-attention, plain or grouped, with or without a key-value cache.

Axes: B batch, T query, S key, C `n_embd`, H query heads, K kv heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import CacheStep
from lit_gpt.model.norm import RMSNorm
from lit_gpt.model.positions import rotate

SHORT_CONTEXT = 512
"""Up to so many tokens attention in training, in bf16 on a CPU, is two plain products."""


class Attention(nn.Module):
    """Causal self-attention, with fewer key and value heads than query heads where the config says so."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.dropout
        self.head_dim = config.head_size
        self.heads = [config.n_head, config.kv_heads, config.kv_heads]
        self.c_attn = nn.Linear(config.n_embd, sum(self.heads) * self.head_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.n_head * self.head_dim, config.n_embd, bias=config.proj_bias)
        self.q_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.grouped = config.kv_heads != config.n_head

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: CacheStep | None = None) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        heads = self.c_attn(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split(self.heads, 1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        dropout = self.dropout if self.training else 0.0
        if cache is None and not self.grouped and dropout == 0 and _trains_in_bf16_on_cpu(q, v):
            y = _causal_attention(q.to(v.dtype), k.to(v.dtype), v)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k.to(q.dtype),
                v.to(q.dtype),
                attn_mask=None if cache is None else cache.mask,
                dropout_p=dropout,
                is_causal=cache is None or cache.is_causal,
                enable_gqa=self.grouped,
            )  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))


def _trains_in_bf16_on_cpu(q: Tensor, v: Tensor) -> bool:
    """Whether two plain products are the faster attention; at 1,024 positions no more, and they would hold (T, T)."""
    short = q.size(2) <= SHORT_CONTEXT
    return (
        short and v.dtype == torch.bfloat16 and v.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad
    )


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention as two batched products: (B, H, T, D) each → (B, H, T, D).

    For bf16 on a CPU: the backward pass of PyTorch's fused kernel there does not use the bf16 units and needs four
    times as long as this one (12 × 2 heads of 128 × 64: 11.7 ms against 2.7, forward and backward, PyTorch 2.13).
    """
    b, h, t, d = q.shape
    mask = torch.full((t, t), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(d)).softmax(-1, dtype=q.dtype)
    return torch.bmm(weights, v).unflatten(0, (b, h))
