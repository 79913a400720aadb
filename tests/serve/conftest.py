"""Servers for the tests, a tokenizer with a chat template, and a browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import models
import pytest
from serving import CHROMIUM, Serving, serving

from lit_gpt.tokenizer.tokenizer import Tokenizer

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
"""Of the browser."""


Routes = Mapping[str, Callable[[Any], None]]
"""Of requests that are not to reach the server: a pattern → what answers them."""


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


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """`visit(server, …)`: the page, loaded. At the end nothing may have been written to the console.

    A page costs a second of a processor: one is for all that a visitor can do in one visit.
    """
    contexts, messages = [], []

    def open_page(
        server: Serving, wait: str = ".bar", quiet: bool = True, routes: Routes | None = None, **options: Any
    ) -> Any:
        options = {"locale": "en-US", "reduced_motion": "reduce", "viewport": {"width": 1200, "height": 900}} | options
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: messages.append(str(error)))
        if quiet:
            page.on("console", lambda message: messages.append(message.text))
        for path, answer in (routes or {}).items():
            page.route(path, answer)
        page.goto(server.url)
        page.wait_for_selector(wait)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []
