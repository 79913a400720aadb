"""Servers for the tests, and a tokenizer with a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import models
import pytest
from serving import Serving, serving

from lit_gpt.tokenizer.tokenizer import Tokenizer


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
    return models.chat_tokenizer(
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
