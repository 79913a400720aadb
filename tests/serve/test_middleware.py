"""The middleware: API key, Host and Origin, limits of bodies, and the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest
from serving import Serving, serving

Start = Callable[..., Serving]


@pytest.mark.slow
def test_every_path_but_health_and_page_needs_the_key(start: Start) -> None:
    server = start(api_key="sesame")
    for path in ("/health", "/", "/page/main.js"):
        assert server.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/version", "/tokenizer_info"):
        for key in (None, "Bearer wrong", "Bearer", "sesame", "Basic sesame", "Bearer s\xe9same"):
            headers = {} if key is None else {"Authorization": key.encode("latin-1")}
            answer = server.get(path, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
        assert server.get(path, headers={"Authorization": "Bearer sesame"}).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.client(api_key="guess").completions.create(model="tiny", prompt="a")
    assert server.client(api_key="sesame").completions.create(model="tiny", prompt="a").choices


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1"}, 200),
        ({"Host": "10.1.2.3"}, 200),
        ({"Host": "gpt.example"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Host": ""}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "localhost:1", "Origin": "http://localhost:1"}, 200),
        ({"Host": "localhost:1", "Origin": "http://localhost:2"}, 403),
    ],
)
def test_host_and_origin(named_host: Serving, headers: dict[str, str], status: int) -> None:
    answer = named_host.get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


@pytest.fixture(scope="module")
def named_host() -> Iterator[Serving]:
    """A server that is also reached as gpt.example."""
    with serving(allowed_hosts=("gpt.example",)) as running:
        yield running


def test_bodies_have_a_limit(server: Serving) -> None:
    large = b'{"prompt": "' + b"a" * (5 << 20) + b'"}'
    assert server.post("/v1/completions", content=large).json()["error"]["code"] == "body_too_large"

    def chunks() -> Any:
        for _ in range(80):
            yield b"a" * (1 << 16)

    assert server.post("/v1/completions", content=chunks()).status_code == 413  # no Content-Length this time
    with suppress(httpx.WriteError, httpx.ReadError):  # the server closes the connection: it is far too large
        assert server.post("/v1/completions", content=b"a" * (33 << 20)).status_code == 413
    assert server.get("/health").status_code == 200


def test_the_log_has_counts_and_no_prompts(server: Serving, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lit_gpt.serve"):
        headers = {"X-Request-Id": "mine-1"}
        answer = server.post(
            "/v1/completions", {"prompt": "a secret", "max_tokens": 3, "ignore_eos": True}, headers=headers
        )
        forged = server.get("/x%0d%0a2026-11-21 info forged%1b[31m", headers={"X-Request-Id": "a b"})
        waited = time.monotonic() + 10  # a line is written after its answer has gone out, maybe one of an earlier test
        lines: list[str] = []
        while len(lines) < 2 and time.monotonic() < waited:
            time.sleep(0.01)
            messages = [record.getMessage() for record in caplog.records]
            lines = [line for line in messages if "mine-1" in line or "forged" in line]
    assert answer.headers["X-Request-Id"] == "mine-1" and forged.headers["X-Request-Id"] != "a b"
    first, second = lines
    assert "request=mine-1" in first and "prompt_tokens=8" in first and "completion_tokens=3" in first
    assert "secret" not in caplog.text
    assert second.isprintable() and "\\r\\n" in second
