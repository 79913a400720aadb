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


class Tab:
    """A page of the usual size and language, used again: one of a new context takes three times as long to load."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._page: Any = None
        self._heard: list[tuple[str, Callable[..., None]]] = []
        self.is_free = True

    def take(self) -> Any:
        """The page, empty."""
        self.is_free = False
        self._page = self._page or new_page(self._browser)
        return self._page

    def on(self, event: str, hear: Callable[..., None]) -> None:
        """Listen until the page is given back."""
        self._page.on(event, hear)
        self._heard.append((event, hear))

    def give_back(self) -> None:
        """Leave nothing of the visit: what is stored, routes, listeners, where the mouse is."""
        page, self._page = self._page, None  # for good if it cannot be emptied: the next test gets another one
        self.is_free = True
        page.unroute_all(behavior="ignoreErrors")
        page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
        while self._heard:
            page.remove_listener(*self._heard.pop())
        page.mouse.move(0, 0)
        page.goto("about:blank")
        self._page = page


def new_page(browser: Any, **options: Any) -> Any:
    """A page of a context of its own."""
    usual = {"locale": "en-US", "reduced_motion": "reduce", "viewport": {"width": 1200, "height": 900}}
    page = browser.new_context(**usual | options).new_page()
    page.set_default_timeout(20_000)
    return page


@pytest.fixture(scope="module")
def tab(browser: Any) -> Tab:
    return Tab(browser)


@pytest.fixture
def visit(browser: Any, tab: Tab) -> Iterator[Callable[..., Any]]:
    """`visit(server, …)`: the page, loaded. At the end nothing may have been written to the console.

    A page costs a second of a processor: one is for all that a visitor can do in one visit.
    """
    opened, messages = [], []

    def open_page(
        server: Serving, wait: str = ".bar", quiet: bool = True, routes: Routes | None = None, **options: Any
    ) -> Any:
        shared = tab.is_free and not options
        page = tab.take() if shared else new_page(browser, **options)
        if not shared:
            opened.append(page)
        listen = tab.on if shared else page.on
        listen("pageerror", lambda error: messages.append(str(error)))
        if quiet:
            listen("console", lambda message: messages.append(message.text))
        for path, answer in (routes or {}).items():
            page.route(path, answer)
        page.goto(server.url)
        page.wait_for_selector(wait)
        return page

    yield open_page
    for page in opened:
        page.context.close()
    if not tab.is_free:
        tab.give_back()
    assert messages == []
