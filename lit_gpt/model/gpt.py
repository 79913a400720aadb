"""The GPT: one class for the blocks of GPT-2, GPT-NeoX, Llama, OLMo 2, Gemma 3 and what lies between.

Axes: B batch, T query, C `n_embd`, V vocabulary; N the tokens of a batch, B · T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.model.attention import Attention
from lit_gpt.model.config import GATED, GPTConfig
from lit_gpt.model.documents import DocumentMasks
from lit_gpt.model.dropout import Dropout
from lit_gpt.model.kv_cache import CacheStep
from lit_gpt.model.linear import BlockLinear
from lit_gpt.model.loss import CHUNK_BYTES, FROZEN_CHUNK_BYTES, head_loss, target_losses
from lit_gpt.model.norm import make_norm
from lit_gpt.model.output import GPTOutput
from lit_gpt.model.positions import PositionTable, local_rope_table, rope_table, sinusoidal_table
from lit_gpt.model.recompute import recomputed
from lit_gpt.model.token_rows import TokenRows

_NOTHING = nullcontext()


class DecodeKernel(Protocol):
    """All blocks of a GPT as one call, for T new tokens in each of B slots: (B, T, C) → (B, T, C)."""

    cache_dtype: torch.dtype

    def supports(self, cache: CacheStep) -> bool:
        """Whether it can work on this cache."""

    def __call__(self, x: Tensor, cache: CacheStep) -> Tensor:
        """The blocks on the new tokens of each slot; their keys and values are written to the cache."""


class GPT(nn.Module):
    """A decoder-only transformer, as its `GPTConfig` describes it.

    Everything that touches a weight happens inside `forward`, which FSDP2 needs.

    Attributes:
        config: its shape.
        activation_checkpointing: recompute each block in the backward pass instead of keeping its activations.
        decode_kernel: all blocks as one call, for inference with a cache; None where there is none.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.decode_kernel: DecodeKernel | None = None
        self.wte = nn.Embedding(config.vocab_rows, config.n_embd)
        self.wpe: nn.Module | None = None
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        elif config.position == "sinusoidal":
            self.wpe = PositionTable(sinusoidal_table(config.block_size, config.n_embd))
        self.rope = PositionTable(rope_table(config)) if config.position == "rope" else None
        local_table = local_rope_table(config)
        self.rope_local = self.rope if local_table is None else PositionTable(local_table)
        self.embd_scale = math.sqrt(config.n_embd) if config.scale_embeddings else None
        self.drop = Dropout(config.dropout) if config.dropout else nn.Identity()
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
        """The dtype that keys and values are best kept in."""
        return self.wte.weight.dtype if self.decode_kernel is None else self.decode_kernel.cache_dtype

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
        documents: Tensor | None = None,
        predict_at: Tensor | None = None,
        each_target: bool = False,
    ) -> GPTOutput:
        """One pass over the tokens.

        Args:
            idx: (B, T) token ids below V.
            targets: (B, T) ids to predict, to compute the loss and no logits; `IGNORE_INDEX` is not counted.
            cache: where to write and read the keys and values of earlier tokens; None to see `idx` alone.
            positions: (T,) or (B, T) position of each token; by default the cache's, or 0 … T - 1.
            last_only: logits of one position of each row only, (B, 1, V): the last, or those in a (B,) tensor.
            return_hidden: the hidden states after `ln_f` too.
            documents: (B, T) number of each token's document, where a row holds several: attention stays inside each,
                and positions begin at 0 in each. For passes without a cache.
            predict_at: (B, T) bool, with `targets`: where to tell the likeliest next id as well.
            each_target: with `targets` the cross-entropy of each instead of their sum.

        Returns:
            Without `targets` the logits, of `vocab_size` ids: those of padded vocabulary rows are cut off. With
            `targets` the summed cross-entropy and how many it counts.

        Raises:
            ValueError: for `documents` together with a cache or positions.
        """
        if documents is not None and (cache is not None or positions is not None):
            raise ValueError("documents have positions of their own, and no cache")
        x = self._hidden(idx, cache, positions, documents)  # (B, T, C)
        if isinstance(last_only, Tensor):
            x = x[torch.arange(len(x), device=x.device), last_only][:, None]
        elif last_only:
            x = x[:, -1:]
        x = self.ln_f(x)
        hidden = x if return_hidden else None
        if targets is None:
            return GPTOutput(logits=self._logits(x), hidden=hidden)
        predicted = None if predict_at is None else self._likeliest(x[predict_at])
        if each_target:
            losses = self._losses(x.flatten(0, 1), targets.flatten()).view_as(targets)
            return GPTOutput(hidden=hidden, losses=losses, predicted=predicted)
        loss_sum, n_targets = self._loss(x.flatten(0, 1), targets.flatten())
        return GPTOutput(hidden=hidden, loss_sum=loss_sum, n_targets=n_targets, predicted=predicted)

    def _hidden(
        self, idx: Tensor, cache: CacheStep | None, positions: Tensor | None, documents: Tensor | None = None
    ) -> Tensor:
        """(B, T) token ids → (B, T, C) after the last block, before `ln_f`."""
        masks = None if documents is None else DocumentMasks(documents)
        positions = positions if masks is None else masks.positions
        kernel = self.decode_kernel if positions is None else None
        if positions is None:
            positions = torch.arange(idx.size(1), device=idx.device) if cache is None else cache.positions
        if cache is not None:  # right padding of a ragged step may be past the last position; it is never read
            positions = positions.clamp(max=self.config.block_size - 1)
        x = self.wte(idx)  # (B, T, C)
        if self.embd_scale is not None:
            x = x * x.new_full((), self.embd_scale)  # rounded to the dtype first, as these models were trained
        if self.wpe is not None:
            x = x + self.wpe(positions).to(x.dtype)
        x = self.drop(x)
        if kernel is not None and cache is not None and kernel.supports(cache):
            return kernel(x, cache)
        rotation, local_rotation = self._rotations(positions)
        for layer, block in enumerate(self.h):
            window = self.config.window_of(layer)
            mask = None if masks is None else masks.visible(window)
            x = self._run_block(block, x, rotation if window is None else local_rotation, cache, mask)
        return x

    def _rotations(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The rotary angles of the new tokens, and those in the layers with a sliding window."""
        if self.rope is None or self.rope_local is None:
            return None, None
        rotation = self.rope(positions)
        return rotation, rotation if self.rope_local is self.rope else self.rope_local(positions)

    def _run_block(
        self, block: nn.Module, x: Tensor, rotation: Tensor | None, cache: CacheStep | None, mask: Tensor | None
    ) -> Tensor:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, rotation, cache, mask, use_reentrant=False)
        return block(x, rotation, cache, mask)

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.lm_head(x)[..., : self.config.vocab_size]
        if self.config.logit_softcap is not None:
            logits = self.config.logit_softcap * torch.tanh(logits / self.config.logit_softcap)
        return logits

    def _loss(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy of (N, C) hidden states in chunks: the (N, V) logits never exist at once."""
        config, head = self.config, self.lm_head
        is_frozen = torch.is_grad_enabled() and not head.weight.requires_grad
        chunk_bytes = FROZEN_CHUNK_BYTES if is_frozen else CHUNK_BYTES
        rows = max(1, chunk_bytes // (x.dtype.itemsize * config.vocab_rows))
        count = (targets != IGNORE_INDEX).sum()
        if torch.is_grad_enabled():
            trained = (head.rows, head.first) if isinstance(head, TokenRows) else ()
            vocabulary = config.vocab_size, config.logit_softcap
            return head_loss(x, targets, head.weight, head.bias, rows, *vocabulary, *trained), count
        # No gradient, but the head may be a layer of kernels or quantised
        losses = [self._chunk_loss(*chunk) for chunk in zip(x.split(rows), targets.split(rows))]
        return torch.stack(losses).sum(), count

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each of (N, C) hidden states, (N,), in chunks as well."""
        config, head = self.config, self.lm_head
        rows = max(1, CHUNK_BYTES // (x.dtype.itemsize * config.vocab_rows))
        if torch.is_grad_enabled():
            trained = (head.rows, head.first) if isinstance(head, TokenRows) else ()
            vocabulary = config.vocab_size, config.logit_softcap
            return target_losses(x, targets, head.weight, head.bias, rows, *vocabulary, *trained)
        return torch.cat([self._chunk_loss(*chunk, "none") for chunk in zip(x.split(rows), targets.split(rows))])

    def _chunk_loss(self, x: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
        logits = self._logits(x)
        logits = logits.double() if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)

    def _likeliest(self, x: Tensor) -> Tensor:
        """The likeliest id after each of (N, C) hidden states, (N,) int64, in chunks as well."""
        rows = max(1, CHUNK_BYTES // (x.dtype.itemsize * self.config.vocab_rows))
        return torch.cat([self._logits(chunk).argmax(-1) for chunk in x.split(rows)])


class Block(nn.Module):
    """Attention and MLP, each with a norm before it, after it, or both, and added to the residual stream."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        before, after = config.block_norm != "post", config.block_norm != "pre"
        self.parallel = config.parallel_residual
        self.ln_1 = make_norm(config, config.n_embd) if before else nn.Identity()
        self.attn = Attention(config, layer)
        self.ln_1_post = make_norm(config, config.n_embd) if after else nn.Identity()
        self.ln_2 = make_norm(config, config.n_embd) if before else nn.Identity()
        self.mlp = MLP(config)
        self.ln_2_post = make_norm(config, config.n_embd) if after else nn.Identity()
        self.drop = Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self, x: Tensor, rotation: Tensor | None = None, cache: CacheStep | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """(B, T, C) → (B, T, C); `mask` as for `Attention`."""
        normed = self.ln_1(x)
        with self._recomputed(normed, self.ln_1, x):
            y = x + self.drop(self.ln_1_post(self.attn(normed, rotation, cache, mask)))
        before = x if self.parallel else y
        normed = self.ln_2(before)
        with self._recomputed(normed, self.ln_2, before):
            return y + self.drop(self.ln_2_post(self.mlp(normed)))

    def _recomputed(self, normed: Tensor, norm: nn.Module, x: Tensor) -> AbstractContextManager[None]:
        """A context in which `normed`, the norm of x, is not kept for the backward pass, if the MLP's is not either."""
        if not self.mlp.recomputes:
            return _NOTHING
        kept = x.detach()
        return recomputed(normed, lambda: norm(kept))


class MLP(nn.Module):
    """Two matrices with an activation between; the gated kinds have a third.

    Attributes:
        recomputes: the widest activation, and in the block what the norms give, are computed again in the backward pass
            instead of being kept.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.recomputes = False
        self.c_fc = BlockLinear(config.n_embd, config.mlp_size, bias=config.mlp_bias)
        self.c_gate = BlockLinear(config.n_embd, config.mlp_size, bias=config.mlp_bias) if config.mlp in GATED else None
        self.c_proj = BlockLinear(config.mlp_size, config.n_embd, bias=config.mlp_bias)
        self.activation = _ACTIVATIONS[config.mlp]

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        up, gate = self.c_fc(x), None if self.c_gate is None else self.c_gate(x)
        inner = self._inner(up, gate)
        if not self.recomputes:
            return self.c_proj(inner)
        kept = up.detach(), None if gate is None else gate.detach()
        with recomputed(inner, lambda: self._inner(*kept)):
            return self.c_proj(inner)

    def _inner(self, up: Tensor, gate: Tensor | None) -> Tensor:
        return self.activation(up) if gate is None else self.activation(gate) * up


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
    "geglu_tanh": _gelu_tanh,
}
