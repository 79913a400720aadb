"""A mock model whose next token is known, and engines over it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import CacheStep
from lit_gpt.model.output import GPTOutput


class CountingModel:
    """Logits are a function of all tokens so far; they travel through the cache as one-dimensional keys.

    It prefers (3 · last + number of tokens) mod V, and counts what it is fed.
    """

    def __init__(self, vocab_size: int = 11, block_size: int = 64, broken: int | None = None) -> None:
        self.config = GPTConfig(vocab_size=vocab_size, block_size=block_size, n_layer=1, n_head=1, n_embd=1, head_dim=1)
        self.broken = broken
        self.batches: list[tuple[int, int]] = []

    def __call__(self, idx: Tensor, cache: CacheStep, last_only: Any = False, return_hidden: bool = False) -> GPTOutput:
        self.batches.append(tuple(idx.shape))  # type: ignore[arg-type]
        keys = idx.double()[:, None, :, None]
        seen, _ = cache.update(0, keys, keys)  # (B, 1, S, 1)
        logits = torch.zeros(*idx.shape, self.config.vocab_size, dtype=torch.float64)
        for b in range(len(idx)):
            for t in range(idx.size(1)):
                position = int(cache.positions.expand(len(idx), -1)[b, t])
                text = seen[b, 0, : position + 1, 0].long().tolist()
                logits[b, t, self.next(text)] = 5.0
                if self.broken is not None and text[-1] == self.broken:
                    logits[b, t, 0] = math.nan
        hidden = torch.nn.functional.one_hot(idx, self.config.vocab_size).double()
        if isinstance(last_only, Tensor):
            logits, hidden = (x[torch.arange(len(x)), last_only][:, None] for x in (logits, hidden))
        elif last_only:
            logits, hidden = logits[:, -1:], hidden[:, -1:]
        return GPTOutput(logits, hidden if return_hidden else None)

    def next(self, text: list[int]) -> int:
        return (3 * text[-1] + len(text)) % self.config.vocab_size

    def greedy(self, prompt: list[int], n: int) -> list[int]:
        text = list(prompt)
        for _ in range(n):
            text.append(self.next(text))
        return text[len(prompt) :]


def counting_engine(model: CountingModel, **values: Any) -> Engine:
    return Engine(model, model.config, dtype=torch.float64, max_slots=8, **values)


def greedy(n: int = 6, **values: Any) -> GenerationConfig:
    return GenerationConfig(strategy="greedy", max_new_tokens=n, **values)


def collect(engine: Engine) -> dict[tuple[int, int], list[int]]:
    """(request, index) → ids, after everything has run."""
    ids: dict[tuple[int, int], list[int]] = {}
    for output in engine.drain():
        ids.setdefault((output.request, output.index), []).extend(token.id for token in output.tokens)
    return ids
