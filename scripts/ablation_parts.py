"""Parts of the speed runs' models and optimizers that `bench_ablation.py` tries and the package does not have.

They are written to be measured: for training without a cache, on one device. What lowers the loss at equal time moves
to the package. Sources: https://github.com/KellerJordan/modded-nanogpt and https://github.com/karpathy/nanochat as of
2026, and the papers named below.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.documents import DocumentMasks
from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import CacheStep
from lit_gpt.train.muon import BatchedMuon, newton_schulz

GATE_INPUTS = 32
"""Of the hidden state, from which the gate of a value embedding is computed."""


class ExtendedGPT(GPT):
    """The GPT with some of these parts, by name.

    - `residual scalars`: each block's input is multiplied by a learned scalar, at first 1.
    - `x0 scalars`: the embedding, times a learned scalar that is at first 0.1, is added to each block's input.
    - `value embeddings`: in every second block, the last included, a second embedding of the token is added to the
      values, times a gate for each head (arXiv 2410.17897, with nanochat's gate).
    - `U-net skips`: what comes out of the first half of the blocks is added to what goes into the second, the last to
      the first, times a learned scalar that is at first 1.
    """

    def __init__(self, config: GPTConfig, parts: Sequence[str]) -> None:
        super().__init__(config)
        n_layer, width = config.n_layer, config.kv_heads * config.head_size
        self.resid = nn.Parameter(torch.ones(n_layer)) if "residual scalars" in parts else None
        self.from_x0 = nn.Parameter(torch.full((n_layer,), 0.1)) if "x0 scalars" in parts else None
        self.skip = nn.Parameter(torch.ones(n_layer // 2)) if "U-net skips" in parts else None
        self.value_embeddings = nn.ModuleDict()
        if "value embeddings" in parts:
            for layer in range(n_layer - 1, -1, -2):
                embedding = self.value_embeddings[str(layer)] = ValueEmbedding(config, width)
                self.h[layer].attn.c_attn = LinearWithValues(self.h[layer].attn.c_attn, embedding)

    def _hidden(
        self, idx: Tensor, cache: CacheStep | None, positions: Tensor | None, documents: Tensor | None = None
    ) -> Tensor:
        assert cache is None and documents is None
        positions = torch.arange(idx.size(1)) if positions is None else positions
        masks: DocumentMasks | None = None
        x = x0 = self.drop(self.wte(idx))
        rotation, _ = self._rotations(positions)
        half, skipped = self.config.n_layer // 2, []
        for layer, block in enumerate(self.h):
            if self.skip is not None and layer >= self.config.n_layer - half:
                x = x + self.skip[layer - self.config.n_layer + half] * skipped.pop()
            x = x if self.resid is None else self.resid[layer] * x
            x = x if self.from_x0 is None else x + self.from_x0[layer] * x0
            if str(layer) in self.value_embeddings:
                self.value_embeddings[str(layer)].idx = idx
            x = self._run_block(block, x, rotation, None, masks)
            if layer < half:
                skipped.append(x)
        return x


class ValueEmbedding(nn.Module):
    """A second embedding of the tokens, added to a block's values."""

    def __init__(self, config: GPTConfig, width: int) -> None:
        super().__init__()
        self.idx: Tensor | None = None
        self.heads = config.kv_heads
        self.embedding = nn.Embedding(config.vocab_rows, width)
        self.gate = nn.Linear(min(GATE_INPUTS, config.n_embd), self.heads, bias=False)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        nn.init.zeros_(self.gate.weight)

    def add(self, x: Tensor, output: Tensor) -> Tensor:
        """To what `c_attn` makes of x: the values are its last columns."""
        assert self.idx is not None
        gate = 2 * torch.sigmoid(self.gate(x[..., : self.gate.in_features]))  # (B, T, K), at first 1
        values = self.embedding(self.idx).unflatten(-1, (self.heads, -1)) * gate[..., None]
        width = self.embedding.embedding_dim
        return torch.cat([output[..., :-width], output[..., -width:] + values.flatten(-2).to(output.dtype)], -1)


class LinearWithValues(nn.Linear):
    """`c_attn` with a value embedding, which is trained as an embedding and so is none of its parameters.

    A class of its own, since `torch.compile` does not look at forward hooks: a block with one would run as what was
    compiled for the blocks without it.
    """

    def __init__(self, linear: nn.Linear, embedding: ValueEmbedding) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        assert linear.bias is None
        self.weight = linear.weight
        self.embedding = (embedding,)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values of x, (B, T, C) to (B, T, all of their columns)."""
        return self.embedding[0].add(x, super().forward(x))


class CautiousMuon(BatchedMuon):
    """Muon whose weight decay is cautious (arXiv 2510.12402).

    Only weights that the update moves towards zero too decay, and the decay falls to zero with the learning rate once
    more.

    Attributes:
        factor: of the learning rate, to be set before each step.
    """

    factor = 1.0

    def _step(self, parameters: list[Tensor], group: dict[str, Any], skip: Tensor | None) -> None:
        momenta = [self._momentum(parameter, group, skip) for parameter in parameters]
        updates = newton_schulz(momenta, group["ns_coefficients"], group["ns_steps"], group["eps"], self.arithmetic)
        for weight, update in zip(parameters, updates):
            if self.beta2:
                update = self._normalized(update, self.state[weight]["mean_square"], skip)
            decay = group["lr"] * group["weight_decay"] * self.factor * (update * weight > 0)
            weight.sub_(weight * decay)
            weight.add_(update, alpha=-group["lr"] * math.sqrt(max(1, weight.size(0) / weight.size(1))))
