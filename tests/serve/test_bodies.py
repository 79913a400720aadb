"""Large and hostile bodies: refused at the first problem, parsed beside the event loop, with limits for every list."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from serving import Serving, wait_for
from starlette.responses import Response

from lit_gpt.serve import protocol as P
from lit_gpt.serve.api_errors import ApiError
from lit_gpt.serve.bodies import parse
from lit_gpt.serve.middleware import BodyLimit
from lit_gpt.serve.prometheus import Metrics
from lit_gpt.serve.worker import Limits

Start = Callable[..., Serving]
N = 60_000

HOSTILE: list[tuple[str, type[BaseModel], Any]] = [
    ("prompt_of_floats", P.CompletionRequest, {"prompt": [0.5] * N}),
    ("prompt_of_objects", P.CompletionRequest, {"prompt": [{"a": 1}] * N}),
    ("prompt_of_negative_ids", P.CompletionRequest, {"prompt": [-1] * N}),
    ("prompt_of_lists_of_floats", P.CompletionRequest, {"prompt": [[0.5]] * N}),
    ("prompt_of_empty_lists", P.CompletionRequest, {"prompt": [[]] * N}),
    ("wrong_at_the_end", P.CompletionRequest, {"prompt": [[1]] * 4000 + [["x"]]}),
    ("biases", P.CompletionRequest, {"prompt": "a", "logit_bias": {str(i): "x" for i in range(N)}}),
    ("stops", P.CompletionRequest, {"prompt": "a", "stop": [1] * N}),
    ("stop_ids", P.CompletionRequest, {"prompt": "a", "stop_token_ids": ["x"] * N}),
    ("unknown_fields", P.CompletionRequest, {"prompt": "a", **{f"x{i}": 1 for i in range(N)}}),
    ("nested_fields", P.CompletionRequest, {"prompt": "a", "stream_options": {f"x{i}": 1 for i in range(N)}}),
    ("messages", P.ChatRequest, {"messages": [{"role": "x"}] * N}),
    ("message_fields", P.ChatRequest, {"messages": [{f"x{i}": 1 for i in range(N)}]}),
    ("parts", P.ChatRequest, {"messages": [{"role": "user", "content": [{"type": "image"}] * N}]}),
    ("generated", P.NextTokenRequest, {"prompt": "a", "generated": ["x"] * N}),
    ("tokens", P.DetokenizeRequest, {"tokens": [None] * N}),
]
"""(name, model, body): a small error for each of its items would be many."""


@pytest.mark.slow
@pytest.mark.parametrize(("model", "body"), [case[1:] for case in HOSTILE], ids=[case[0] for case in HOSTILE])
def test_a_body_of_bad_items_makes_a_handful_of_errors(model: type[BaseModel], body: Any) -> None:
    text = json.dumps(body).encode()
    with pytest.raises(ValidationError) as error:  # by pydantic, whatever is refused before it is asked
        model.model_validate(from_json(text))
    assert error.value.error_count() < 20
    with pytest.raises(ApiError) as refusal:
        parse(model, text)
    assert refusal.value.status == 400 and len(str(refusal.value)) < 300


@pytest.mark.parametrize(
    "body", [b"{", b"[" * 40_000, b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", b'"\\ud800"', b"\xff", b"{} x"]
)
def test_what_is_no_json_is_one_400(server: Serving, body: bytes) -> None:
    answer = server.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


def test_a_body_has_few_lists_and_objects_but_brackets_in_texts_are_no_lists() -> None:
    with pytest.raises(ApiError, match="more than 50000 lists and objects: split it"):
        parse(P.CompletionRequest, json.dumps({"prompt": [[[1]]] * N}).encode())
    text = '[{"\\' * N
    assert parse(P.TokenizeRequest, json.dumps({"prompt": text}).encode()) == P.TokenizeRequest(prompt=text)


@pytest.mark.slow
def test_others_are_answered_while_large_bodies_come_in(server: Serving) -> None:
    """Each of these held up everybody for half a minute; the limit here is far above what they take now."""
    size = 1 << 20
    bodies = [
        ("/v1/completions", {"prompt": [0.5] * (size // 5)}),
        ("/v1/completions", {"prompt": [[[1]]] * (size // 8)}),
        ("/v1/completions", {"prompt": " " * size}),
        ("/tokenize", {"prompt": "ab " * (size // 3)}),
        ("/detokenize", {"tokens": [1] * (size // 3)}),
        ("/detokenize", {"tokens": ["x"] * (size // 5)}),
    ]
    texts = [(path, json.dumps(body).encode()) for path, body in bodies]
    slowest = 0.0
    headers = {"Content-Type": "application/json"}
    with ThreadPoolExecutor(len(texts)) as pool:
        sent = [pool.submit(server.http.post, path, content=text, headers=headers) for path, text in texts]
        while not all(each.done() for each in sent):
            began = time.perf_counter()
            assert server.get("/health").status_code == 200
            slowest = max(slowest, time.perf_counter() - began)
    statuses = [each.result().status_code for each in sent]
    assert statuses[:3] == [400, 400, 400] and set(statuses[3:5]) <= {200, 400} and statuses[5] == 400
    assert slowest < 5


def test_a_text_that_cannot_fit_is_refused_before_it_is_tokenised(server: Serving) -> None:
    error = server.post("/v1/completions", {"prompt": ["a", "x" * 5000]}).json()["error"]
    assert error["message"] == (
        "the prompt's 5000 characters are at least 5000 tokens and exceed this model's context of 96: shorten it"
    )
    assert error["code"] == "context_length_exceeded"


def test_all_bodies_together_have_a_limit() -> None:
    metrics = Metrics()
    release = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await release.wait()
        await Response("done")(scope, receive, send)

    async def post(limit: BodyLimit, size: int) -> list[Any]:
        sent: list[Any] = []
        messages = [{"type": "http.request", "body": b"x" * size, "more_body": False}]

        async def send(message: Any) -> None:
            sent.append(message)

        async def receive() -> Any:
            return messages.pop() if messages else await asyncio.Event().wait()

        await limit({"type": "http", "method": "POST", "headers": []}, receive, send)
        return sent

    async def use() -> None:
        limit = BodyLimit(app, metrics, max_held=1000)
        first = asyncio.create_task(post(limit, 700))
        await asyncio.sleep(0)
        refused = await post(limit, 400)
        assert refused[0]["status"] == 503 and b"bodies_too_large" in refused[1]["body"] and limit.held == 700
        release.set()
        assert (await first)[0]["status"] == 200 and limit.held == 0
        assert (await post(limit, 400))[0]["status"] == 200 and limit.held == 0

    asyncio.run(use())


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_tokenize_and_detokenize_take_capacity_as_the_rest_does(start: Start, path: str) -> None:
    server = start(seconds=0.05, max_slots=1, limits=Limits(max_queue=0))
    body = {"prompt": "a", "max_tokens": 10, "ignore_eos": True}
    text = {"prompt": "a"} if path == "/tokenize" else {"tokens": [65]}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", body)
        wait_for(lambda: server.service.worker.reserved == 1)
        refused = server.post(path, text)
        assert refused.status_code == 429 and "Retry-After" in refused.headers
        assert running.result().status_code == 200
    assert server.post(path, text).status_code == 200
    server.wait_until_idle()
