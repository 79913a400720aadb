"""What the tests of the page share: a tokenizer and a model whose texts can be compared, and the page's first steps."""

from __future__ import annotations

import json
from typing import Any

import torch

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer


def byte_tokenizer() -> Tokenizer:
    """Bytes, in an order in which the printable ones of ASCII come first."""
    return Tokenizer.build("letters", r"(?s:.)", {bytes([(value + 32) % 256]): value for value in range(256)}, {})


def ascii_model(seed: int) -> GPT:
    """A model that reads every byte and generates printable ASCII, so that the tests can compare texts."""
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(vocab_size=256, block_size=96, n_layer=2, n_head=4, n_embd=32, init_std=0.3, head_bias=True)
    ).double()
    with torch.no_grad():
        model.lm_head.bias[95:] = -1e4
    return model.double().eval()


def flip(page: Any, times: int = 1) -> None:
    """Press Flip, and wait for each token."""
    for _ in range(times):
        before = page.locator(".lane").first.locator(".token").count()
        page.click("#flip")
        page.locator(".lane").first.locator(".token").nth(before).wait_for()
        page.wait_for_selector("#flip:not([disabled])")


def prompt(page: Any, text: str) -> None:
    """Type a text, and wait for its distribution."""
    with page.expect_response(lambda answer: json.loads(answer.request.post_data or "{}").get("prompt") == text):
        page.fill("#prompt", text)
    page.wait_for_selector("#flip:not([disabled])")
