"""The GPT: one class for GPT-2's block, the Llama family's and what lies between.

Axes: B batch, T query, S key, C `n_embd`, H query heads, K kv heads, D head dimension, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import CacheStep
from lit_gpt.model.loss import CHUNK_BYTES, head_loss

SHORT_CONTEXT = 512
"""Up to here attention in training, in bf16 on a CPU, is two plain products."""


class Decoder(Protocol):
    """All blocks as one call, for one new token in each row: (B, 1, C) → (B, 1, C)."""

    cache_dtype: torch.dtype

    def takes(self, cache: CacheStep) -> bool:
        """Whether it can work on this cache."""

    def __call__(self, x: Tensor, cache: CacheStep) -> Tensor:
        """The blocks on one new token in each row."""


class GPT(nn.Module):
    """A decoder-only transformer, as `GPTConfig` describes it.

    Everything that touches a weight happens inside `forward`, which FSDP2 needs.

    Attributes:
        config: its shape.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        decoder: all blocks as one call, for inference with one new token in each row; None if there is no such form.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.decoder: Decoder | None = None
        self.wte = nn.Embedding(config.vocab_rows, config.n_embd)
        self.wpe: nn.Module | None = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        elif config.position == "sinusoidal":
            self.wpe = PositionTable(sinusoidal_table(config.block_size, config.n_embd))
        self.rope = PositionTable(rope_table(config)) if config.position == "rope" else None
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_rows, bias=config.head_bias)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self) -> None:
        """Make `lm_head` share its weight with `wte` if the config says so; needed again after weights are assigned."""
        if self.config.tie_embeddings:
            self.lm_head.weight = self.wte.weight

    @property
    def cache_dtype(self) -> torch.dtype:
        """What keys and values are best kept in."""
        return self.wte.weight.dtype if self.decoder is None else self.decoder.cache_dtype

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's initialisation: normal weights, zero biases, residual projections scaled by 1/√(2 · n_layer)."""
        config = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
        residual_std = 0.0 if config.zero_init_proj else config.init_std / math.sqrt(2 * config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=residual_std)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        cache: CacheStep | None = None,
        positions: Tensor | None = None,
        last_only: bool | Tensor = False,
        return_hidden: bool = False,
    ) -> Any:
        """One pass over the tokens.

        Args:
            idx: (B, T) token ids below V.
            targets: (B, T) ids to predict; `IGNORE_INDEX` is not counted.
            cache: where to put and find the keys and values of earlier tokens; None to see `idx` alone.
            positions: (T,) or (B, T) place of each token; by default the cache's, or 0 … T - 1.
            last_only: logits of one position of each row only, (B, 1, V): the last, or those in a (B,) tensor.
            return_hidden: the hidden states after `ln_f` too.

        Returns:
            With `targets` the pair (summed cross-entropy in nats, number of targets), both scalars. Otherwise logits
            (B, T, V), or with `return_hidden` the pair of logits and hidden states (B, T, C). V is `vocab_size`: logits
            of padded vocabulary rows are cut off.
        """
        decoder = self.decoder if positions is None and idx.size(1) == 1 else None
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.positions
        if cache is not None:  # right padding of a ragged step may stand past the last position; it is never read
            positions = positions.clamp(max=self.config.block_size - 1)
        x = self.wte(idx)  # (B, T, C)
        if self.wpe is not None:
            x = x + self.wpe(positions).to(x.dtype)
        x = self.drop(x)
        if decoder is not None and cache is not None and decoder.takes(cache):
            x = decoder(x, cache)
        else:
            rotation = None if self.rope is None else self.rope(positions)
            for block in self.h:
                x = self._run_block(block, x, rotation, cache)
        if isinstance(last_only, Tensor):
            x = x[torch.arange(len(x), device=x.device), last_only][:, None]
        elif last_only:
            x = x[:, -1:]
        x = self.ln_f(x)
        if targets is not None:
            return self._loss(x.flatten(0, 1), targets.flatten())
        logits = self._logits(x)
        return (logits, x) if return_hidden else logits

    def _run_block(self, block: nn.Module, x: Tensor, rotation: Tensor | None, cache: CacheStep | None) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rotation, cache, use_reentrant=False)
        return block(x, rotation, cache)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def _loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of (N, C) hidden states in chunks: the (N, V) logits never exist at once."""
        config = self.config
        rows = max(1, CHUNK_BYTES // (x.dtype.itemsize * config.vocab_rows))
        count = (targets != IGNORE_INDEX).sum()
        if torch.is_grad_enabled():
            weight, bias = self.lm_head.weight, self.lm_head.bias
            return head_loss(x, targets, weight, bias, rows, config.vocab_size, config.logit_softcap), count
        # No gradient, but maybe a head that is packed or quantised
        losses = [self._chunk_loss(*chunk) for chunk in zip(x.split(rows), targets.split(rows))]
        return torch.stack(losses).sum(), count

    def _chunk_loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits(x)
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(self, x: Tensor, rotation: Tensor | None = None, cache: CacheStep | None = None) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.drop(self.attn(self.ln_1(x), rotation, cache))
        return x + self.drop(self.mlp(self.ln_2(x)))


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

    For bf16 on a CPU: the backward pass of PyTorch's fused kernel there does not use the bf16 units and takes four
    times as long as this one (12 × 2 heads of 128 × 64: 11.7 ms against 2.7, forward and backward, PyTorch 2.13).
    """
    b, h, t, d = q.shape
    mask = torch.full((t, t), -math.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v = q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1)
    weights = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=1 / math.sqrt(d)).softmax(-1, dtype=q.dtype)
    return torch.bmm(weights, v).unflatten(0, (b, h))


class MLP(nn.Module):
    """Two matrices with an activation between; SwiGLU has a third as its gate."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.mlp_bias)
        self.c_gate = (
            nn.Linear(config.n_embd, config.mlp_size, bias=config.mlp_bias) if config.mlp == "swiglu" else None
        )
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        if self.c_gate is not None:
            return self.c_proj(self.activation(self.c_gate(x)) * self.c_fc(x))
        return self.c_proj(self.activation(self.c_fc(x)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
    "swiglu": F.silu,
}


def make_norm(config: GPTConfig, size: int) -> nn.Module:
    """The config's norm over the last axis of `size`."""
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return nn.LayerNorm(size, eps=config.norm_eps, bias=config.norm_bias)


class RMSNorm(nn.RMSNorm):
    """RMSNorm that follows its input's dtype: under autocast the fused kernel takes no bf16 input with fp32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return F.rms_norm(x, tuple(self.normalized_shape), self.weight.to(x.dtype), self.eps)


class PositionTable(nn.Module):
    """A constant (block_size, …) table looked up by position.

    It is no buffer: it belongs to no checkpoint, outlives initialisation on the meta device, and follows the model from
    device to device but not into bf16, in which positions past 256 would run together.
    """

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PositionTable:
        super()._apply(fn, recurse)
        moved = fn(self.table)
        if moved.device.type != "meta":
            self.table = self.table.to(moved.device, torch.float64 if moved.dtype == torch.float64 else torch.float32)
        return self

    def forward(self, positions: Tensor) -> Tensor:
        """(T,) or (B, T) positions → the rows of the table, with the positions' axes in front."""
        return self.table.to(positions.device)[positions]


def sinusoidal_table(block_size: int, n_embd: int) -> Tensor:
    """(block_size, C): sines in even columns and cosines in odd ones (arXiv 1706.03762, section 3.5)."""
    with torch.device("cpu"):
        frequency = torch.exp(torch.arange(0, n_embd, 2, dtype=torch.float64) * (-math.log(10000.0) / n_embd))
        angle = torch.arange(block_size, dtype=torch.float64)[:, None] * frequency
        table = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)
        return table[:, :n_embd].float()


def rope_table(config: GPTConfig) -> Tensor:
    """(block_size, 2, D / 2): cosines and sines of each position's angles (arXiv 2104.09864)."""
    with torch.device("cpu"):
        exponent = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
        frequency = scale_frequencies(config.rope_theta**-exponent, config.rope_scaling)
        angle = torch.arange(config.block_size, dtype=torch.float64)[:, None] * frequency
        return torch.stack([angle.cos(), angle.sin()], dim=1).float()


def scale_frequencies(frequency: Tensor, scaling: dict[str, Any] | None) -> Tensor:
    """Stretch rotary frequencies for contexts longer than those trained on.

    `linear` divides all by `factor` (arXiv 2306.15595). `llama3` leaves wavelengths below
    original / high_freq_factor alone, divides those above original / low_freq_factor, and blends between (the Llama 3.1
    release).
    """
    if scaling is None:
        return frequency
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: short wavelengths, unchanged
    return keep * frequency + (1 - keep) * frequency / scaling["factor"]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn (B, heads, T, D) by `rotation`, (T, 2, D/2) or (B, T, 2, D/2): dimension i goes with i + D/2."""
    if rotation.dim() == 4:
        rotation = rotation[:, None]  # (B, 1, T, 2, D/2)
    cos, sin = rotation.to(x.dtype).unbind(-2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
