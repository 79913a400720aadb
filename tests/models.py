"""Tiny random models for the tests, and a tokenizer of bytes with a chat template."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer


def tiny_config(**shape: Any) -> GPTConfig:
    """2 layers, 4 heads, width 32, context 32 and 257 ids, but for what `shape` says."""
    return GPTConfig(**{"vocab_size": 257, "block_size": 32, "n_layer": 2, "n_head": 4, "n_embd": 32, **shape})


def tiny_gpt(seed: int = 0, std: float | None = 0.3, dtype: torch.dtype = torch.float64, **shape: Any) -> GPT:
    """A random GPT of that shape, in eval mode.

    Args:
        seed: of its weights.
        std: of all its parameters: larger than the initialisation's, so that the arg-max changes from token to token,
            and no zero or one hides a missing bias or norm. None for the model's own initialisation.
        dtype: of its parameters.
        shape: of its config, where it is not `tiny_config`'s.
    """
    torch.manual_seed(seed)
    model = GPT(tiny_config(**shape)).to(dtype).eval()
    for parameter in model.parameters() if std is not None else ():
        torch.nn.init.normal_(parameter, std=std)
    return model


def chat_tokenizer(template: str) -> Tokenizer:
    """Bytes, with the special tokens of ChatML and a chat template."""
    byte = get_tokenizer("byte")
    specials = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    return replace(Tokenizer.build("chat", byte.pattern, byte.ranks, specials), chat_template=template)
