"""Sample texts for a model card: continuations of nothing, drawn with a fixed seed, as they come."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.model.gpt import GPT
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.tokenizer.tokenizer import Tokenizer

TEMPERATURE, TOP_K, SEED, LENGTH = 0.8, 50, 1, 100
"""As `fit` draws the samples that it logs; the length is in tokens."""


@torch.inference_mode()
def sample_texts(model: GPT, tokenizer: Tokenizer, count: int) -> list[str]:
    """`count` texts by the model, all drawn at once; none if its logits are no numbers, or its context is one token.

    Args:
        model: on the CPU and in eval mode.
        tokenizer: its own.
        count: how many.
    """
    start = _start(tokenizer, model.config.vocab_size)
    length = min(LENGTH, model.config.block_size - len(start))
    cache = KVCache(model.config, count, model.config.block_size, model.wte.weight.dtype)
    generator = torch.Generator().manual_seed(SEED)
    slots, idx = list(range(count)), torch.tensor([start] * count)
    drawn: list[Tensor] = []
    for _ in range(length):
        logits = model(idx, cache=cache.step(slots, idx.size(1)), last_only=True).logits[:, -1]  # (count, V)
        if not logits.isfinite().all():
            return []
        cache.extend(slots, idx.size(1))
        idx = _draw(logits[:, : tokenizer.n_vocab], generator)
        drawn.append(idx)
    rows = torch.cat(drawn, dim=1).tolist() if drawn else []
    return [tokenizer.decode(_until_end(row, tokenizer.eot_id)) for row in rows]


def _start(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """What stands before a text: the id that begins one, or ends the one before, or else a new line."""
    begins = [[number] for number in (tokenizer.bos_id, tokenizer.eot_id) if number is not None]
    return next(ids for ids in [*begins, tokenizer.encode("\n"), [0]] if max(ids) < vocab_size)


def _draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One of the `TOP_K` likeliest tokens of each row, (count, V) → (count, 1)."""
    values, tokens = logits.float().topk(min(TOP_K, logits.size(1)))
    choice = torch.multinomial((values / TEMPERATURE).softmax(dim=-1), 1, generator=generator)
    return tokens.gather(1, choice)


def _until_end(ids: list[int], end: int | None) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
