"""Causal self-attention, plain or grouped, with or without a key-value cache.

Axes: B batch, T query, S key, C `n_embd`, H query heads, K kv heads, D head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.dropout import dropout
from lit_gpt.model.kv_cache import CacheStep, attention_mask
from lit_gpt.model.linear import BlockLinear
from lit_gpt.model.norm import make_rms_norm
from lit_gpt.model.positions import rotate

SHORT_CONTEXT = 512
"""Up to so many tokens attention in training, in bf16 on a CPU, is two plain products."""


class Attention(nn.Module):
    """Causal self-attention, with fewer key and value heads than query heads where the config says so."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.dropout = config.attention_dropout
        self.head_dim = config.head_size
        self.scale = config.attn_scale
        self.window = config.window_of(layer)
        self.widths = [heads * self.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
        self.c_attn = BlockLinear(config.n_embd, sum(self.widths), bias=config.qkv_bias)
        self.c_proj = BlockLinear(config.n_head * self.head_dim, config.n_embd, bias=config.proj_bias)
        self.norms_all_heads = config.qk_norm_full
        q_width, k_width = self.widths[:2] if config.qk_norm_full else (self.head_dim, self.head_dim)
        self.q_norm = make_rms_norm(config, q_width) if config.qk_norm else nn.Identity()
        self.k_norm = make_rms_norm(config, k_width) if config.qk_norm else nn.Identity()
        self.grouped = config.kv_heads != config.n_head

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, cache: CacheStep | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) → (B, T, C); `mask`, (B, 1, T, T), is True where a query attends to a key, by default causal."""
        q, k, v = self.c_attn(x).split(self.widths, -1)  # (B, T, H · D), and K · D twice
        if self.norms_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in (q, k, v))  # (B, H or K, T, D)
        if not self.norms_all_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, K, S, D)
        mask, is_causal = self._visible(x, cache) if mask is None else (mask, False)
        probability = self.dropout if self.training else 0.0
        if cache is None and not self.grouped and _trains_in_bf16_on_cpu(q, v):
            y = _causal_attention(q.to(v.dtype), k.to(v.dtype), v, self.scale, mask, probability)
        else:
            y = F.scaled_dot_product_attention(
                q,
                k.to(q.dtype),
                v.to(q.dtype),
                attn_mask=mask,
                dropout_p=probability,
                is_causal=is_causal,
                scale=self.scale,
                enable_gqa=self.grouped,
            )  # (B, H, T, D)
        return self.c_proj(y.transpose(1, 2).flatten(2))

    def _visible(self, x: Tensor, cache: CacheStep | None) -> tuple[Tensor | None, bool]:
        """A mask that broadcasts to (B, H, T, S), or None; and whether plain causal attention does instead."""
        if cache is not None:
            return cache.visible(self.window)
        n_tokens = x.size(1)
        if self.window is None or n_tokens <= self.window:
            return None, True
        return attention_mask(torch.arange(n_tokens, device=x.device), n_tokens, self.window), False


def _trains_in_bf16_on_cpu(q: Tensor, v: Tensor) -> bool:
    """Whether two plain products are the faster attention; at 1,024 positions no more, and they would hold (T, T)."""
    short = q.size(2) <= SHORT_CONTEXT
    return (
        short and v.dtype == torch.bfloat16 and v.device.type == "cpu" and torch.is_grad_enabled() and q.requires_grad
    )


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, mask: Tensor | None = None, probability: float = 0.0
) -> Tensor:
    """Attention as two batched products: (B, H, T, D) each → (B, H, T, D).

    For bf16 on a CPU: the backward pass of PyTorch's fused kernel there does not use the bf16 units and needs four
    times as long as this one (12 × 2 heads of 128 × 64: 11.7 ms against 2.7, forward and backward, PyTorch 2.13).

    Args:
        q: queries.
        k: keys.
        v: values.
        scale: of the products; 1/√D by default.
        mask: (T, T) or (B, 1, T, T), True where a query attends to a key; causal by default.
        probability: of dropout, on the weights.
    """
    b, h, t, d = q.shape
    hidden = torch.ones(t, t, dtype=torch.bool, device=q.device).triu(1) if mask is None else ~mask
    bias = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -math.inf)
    if bias.dim() == 4:
        bias = bias.expand(b, h, t, t).flatten(0, 1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    factor = 1 / math.sqrt(d) if scale is None else scale
    weights = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=factor).softmax(-1, dtype=q.dtype)
    return torch.bmm(dropout(weights, probability), v).unflatten(0, (b, h))
