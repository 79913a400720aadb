"""Tiny random models that chat: bytes with our chat template, answers of printable ASCII."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from models import tiny_gpt

from lit_gpt.checkpoint.format import save_model
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.chatml import with_chat_template
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

NEVER = -1e4
"""A weight with which a token is not drawn."""


def chatml_tokenizer() -> Tokenizer:
    """Bytes, end-of-text, and the special tokens of our chat template."""
    return with_chat_template(get_tokenizer("byte"))


def chat_gpt(seed: int = 0, end: float = 0.0, **shape: Any) -> GPT:
    """A random GPT for `chatml_tokenizer`, in float64.

    Args:
        seed: of its weights.
        end: weight of the token that ends an answer; `NEVER` for answers that end with the context only.
        shape: of its config.
    """
    shape = {"vocab_size": 259, "block_size": 256, "init_std": 0.3, **shape}
    model = tiny_gpt(seed, std=None, head_bias=True, **shape)
    with torch.no_grad():
        model.lm_head.bias[:] = NEVER
        model.lm_head.bias[32:127] = 0.0
        model.lm_head.bias[chatml_tokenizer().specials["<|im_end|>"]] = end
    return model


def save_chat_model(path: Path, seed: int = 0, end: float = 0.0, **shape: Any) -> Path:
    """A checkpoint of `chat_gpt`, in float32; `path`."""
    save_model(path, chat_gpt(seed, end, **shape).float(), chatml_tokenizer())
    return path


def chatml(*turns: tuple[str, str]) -> list[int]:
    """Ids of a conversation of (role, content), up to where the assistant's turn begins, put together by hand."""
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return chatml_tokenizer().encode_with_specials(f"{text}<|im_start|>assistant\n")
