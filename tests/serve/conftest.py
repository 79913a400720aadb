"""Servers for the tests, and a tokenizer with a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
from serving import Serving, serving

from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer


@pytest.fixture(scope="session")
def server() -> Iterator[Serving]:
    """One server for all tests that do not change its state."""
    with serving() as running:
        yield running


@pytest.fixture
def start() -> Iterator[Callable[..., Serving]]:
    """`start(max_slots=1, …)`: a server for this test alone."""
    with ExitStack() as stack:
        yield lambda **options: stack.enter_context(serving(**options))


@pytest.fixture(scope="session")
def chat_tokenizer() -> Tokenizer:
    """Bytes, with special tokens and a chat template."""
    byte = get_tokenizer("byte")
    specials = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return replace(Tokenizer.build("chat", byte.pattern, byte.ranks, specials), chat_template=template)
