"""A stream of well-formed and malformed requests, with good ones between: those come out right, and the server lives.

The model has more rows than its tokenizer has ids, so that every check of an id against the wrong number shows.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import Serving, make_model, serving

from lit_gpt.serve.connections import ConnectionLimits
from lit_gpt.serve.worker import Limits
from lit_gpt.tokenizer.tokenizer import Tokenizer

ROWS = 320
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/next_token", "/tokenize", "/detokenize")
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% if 'loop' in m['content'] %}{{ 1 // 0 }}{% endif %}{% endfor %}"

ids = st.lists(st.integers(0, 258) | st.integers(-2, ROWS + 3), max_size=9)
texts = st.text(max_size=12) | st.sampled_from(["", " " * 3000, "<|im_start|>", "\ud800", "loop", "a" * 96])
prompts = texts | ids | st.lists(texts, max_size=3) | st.lists(ids, max_size=3)
numbers = st.sampled_from([-1, 0, 1e-300, 0.5, 1, 1.3, 2, 100, 1e308, 2**63, None, True, "x", [1], {}])
small = st.sampled_from([None, -1, 0, 1, 2, 20, 21, True])
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": prompts, "tokens": ids, "generated": ids, "max_tokens": st.integers(0, 12) | numbers, "n": small,
    "messages": st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "robot"]), "content": texts})),
    "echo": st.booleans(), "logprobs": small, "stream": st.booleans(), "seed": numbers, "limit": numbers,
    "temperature": numbers, "top_k": numbers, "top_p": numbers, "min_p": numbers,
    "repetition_penalty": numbers, "frequency_penalty": numbers, "presence_penalty": numbers,
    "stop": texts | st.lists(texts, max_size=3), "stop_token_ids": ids, "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, ROWS).map(str), st.sampled_from([-100, -1, 0, 100]), max_size=3),
    "min_tokens": small, "return_token_ids": st.booleans(), "nonsense": numbers,
}  # fmt: skip
WANTED = {
    "/v1/completions": ["prompt", "max_tokens"],
    "/v1/chat/completions": ["messages", "max_tokens"],
    "/v1/next_token": ["prompt"],
    "/tokenize": ["prompt"],
    "/detokenize": ["tokens"],
}


@st.composite
def requests(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path, and a body that is often right, or else wrong in a few ways."""
    path = draw(st.sampled_from(PATHS))
    others = draw(st.lists(st.sampled_from(sorted(FIELDS)), max_size=4))
    body = json.dumps({name: draw(FIELDS[name]) for name in [*WANTED[path], *others]}).encode()
    damage = draw(st.sampled_from(["none"] * 8 + ["cut", "byte"]))
    if damage == "cut":
        return path, body[: len(body) // 2]
    return path, body.replace(b"1", b"\xff") if damage == "byte" else body


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
    max_examples=40,
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
