"""A stream of well-formed and malformed requests, with good ones between: those come out right, and the server lives.

The model has more rows than its tokenizer has ids, so that every check of an id against the wrong number shows.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from request_fuzz import ROWS, TEMPLATE, requests
from serving import Serving, make_model, serving

from lit_gpt.serve.connections import ConnectionLimits
from lit_gpt.serve.worker import Limits
from lit_gpt.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def abused(chat_tokenizer: Tokenizer) -> Iterator[Serving]:
    with serving(
        model=make_model(vocab_size=ROWS),
        tokenizer=replace(chat_tokenizer, chat_template=TEMPLATE),
        limits=Limits(max_queue=8),
        connections=ConnectionLimits(max_connections=40),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def right(abused: Serving) -> list[dict[str, Any]]:
    """Good requests, each with the text that it must always get."""
    bodies: list[dict[str, Any]] = [
        {"prompt": "To be", "max_tokens": 9, "temperature": 0},
        {"prompt": "or not", "max_tokens": 9, "seed": 3, "repetition_penalty": 1.2, "top_k": 40, "ignore_eos": True},
        {"prompt": [65, 256, 258], "max_tokens": 5, "seed": 4, "echo": True, "logprobs": 2, "frequency_penalty": 0.5},
    ]
    return [{"body": body, "choices": abused.complete(**body)["choices"]} for body in bodies]


def assert_right(answer: dict[str, Any], good: dict[str, Any]) -> None:
    """The same text; log-probabilities up to rounding, which depends on how many rows a product of matrices has."""
    (choice,), (expected,) = answer["choices"], good["choices"]
    assert (choice["text"], choice["finish_reason"]) == (expected["text"], expected["finish_reason"])
    if expected["logprobs"] is not None:
        assert choice["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
        found, wanted = (each["logprobs"]["token_logprobs"][1:] for each in (choice, expected))
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.slow
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(bad=st.lists(requests(), min_size=3, max_size=6), leaves=st.booleans(), turn=st.integers(0, 2))
def test_good_requests_come_out_right_between_random_ones(
    abused: Serving, right: list[dict[str, Any]], bad: list[tuple[str, bytes]], leaves: bool, turn: int
) -> None:
    headers = {"Content-Type": "application/json"}
    good = right[turn]
    with ThreadPoolExecutor(len(bad) + 1) as pool:
        sent = [pool.submit(abused.http.post, path, content=body, headers=headers) for path, body in bad]
        if leaves:
            _send_and_leave(abused, *bad[0])
        answer = abused.complete(**good["body"])
        answers = [each.result() for each in sent]
    assert_right(answer, good)
    for (path, body), each in zip(bad, answers):
        error = {} if each.status_code == 200 else each.json()["error"]
        assert each.status_code in (200, 400, 429) or error["code"] == "generation_failed", (path, body, each.text)
        # what penalties overflow is told in words; the name of an exception would be a defect
        assert "the log says where" not in each.text, (path, body, each.text)
    assert abused.get("/health").status_code == 200


def _send_and_leave(server: Serving, path: str, body: bytes) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + body)


def test_nothing_is_left_of_them(abused: Serving, right: list[dict[str, Any]]) -> None:
    """After the stream of requests above: no slot, no capacity, and no body is held."""
    abused.wait_until_idle()
    worker = abused.service.worker
    assert not worker._jobs and not worker._prompts and worker.engine.slots.load == 0 and not worker.engine.has_work
    assert worker.stop_reason is None
    for good in right:
        assert_right(abused.complete(**good["body"]), good)
