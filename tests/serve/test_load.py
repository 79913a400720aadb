"""The server under load: full queues, slow models, clients that disconnect, a failing engine, shutdown, metrics."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from serving import Serving, wait_for

from lit_gpt.generation.engine import Engine
from lit_gpt.serve.worker import Limits

Start = Callable[..., Serving]


def disconnect_after(server: Serving, body: dict[str, Any], seconds: float) -> None:
    """Send a request and close the connection after `seconds`, without reading the rest of the response."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
        time.sleep(seconds)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_slot(start: Start, stream: bool) -> None:
    server = start(seconds=0.05, max_slots=1)
    body = {"prompt": "a", "max_tokens": 90, "ignore_eos": True, "stream": stream}
    disconnect_after(server, body, 0.4)
    wait_for(lambda: server.service.worker.engine.n_running == 1 or server.metric("client_disconnects") == 1)
    forwards = server.service.worker.engine.model_runner.forwards
    server.wait_until_idle()
    assert server.service.worker.engine.model_runner.forwards - forwards < 20  # 90 if it had gone on
    assert server.metric("client_disconnects") == 1
    assert server.complete(prompt="a", max_tokens=2)["usage"]["completion_tokens"] <= 2


def test_an_async_client_that_cancels_frees_its_slot(start: Start) -> None:
    server = start(seconds=0.05, max_slots=1)

    async def use() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as client:
            stream = await client.completions.create(
                model="tiny", prompt="a", max_tokens=90, stream=True, extra_body={"ignore_eos": True}
            )
            async for _ in stream:
                break
            await stream.close()

    asyncio.run(use())
    server.wait_until_idle()
    assert server.service.worker.engine.model_runner.forwards < 30


@pytest.mark.slow
def test_a_full_queue_refuses_with_retry_after(start: Start) -> None:
    server = start(seconds=0.05, max_slots=1, limits=Limits(max_queue=1))
    body = {"prompt": "a", "max_tokens": 30, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(server.post, "/v1/completions", body) for _ in range(2)]
        wait_for(lambda: server.service.worker.reserved == 2)
        # a body that would fail later is refused just the same: capacity is reserved before any work
        refused = server.post("/v1/completions", {"prompt": "a" * 10_000})
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        error = refused.json()["error"]
        assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
        assert error["message"].startswith("the queue is full (2 sequences run or wait): try again in ")
        with pytest.raises(openai.RateLimitError):
            server.client().completions.create(model="tiny", prompt="a")
        waited = server.client(max_retries=5).completions.create(model="tiny", prompt="a", max_tokens=1)
        assert waited.choices[0].finish_reason
        assert [answer.result().status_code for answer in running] == [200, 200]
    assert server.metric('requests_rejected_total{reason="queue_full"}') >= 2
    assert server.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}).json()["error"]["param"] == "n"


@pytest.mark.slow
def test_limits_of_waiting_and_of_the_whole_request(start: Start) -> None:
    server = start(seconds=0.05, max_slots=1, limits=Limits(queue_seconds=0.3, request_seconds=1.2))
    body = {"prompt": "a", "max_tokens": 90, "ignore_eos": True}
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.post, "/v1/completions", body)
        wait_for(lambda: server.service.worker.engine.n_running == 1)
        waited = server.post("/v1/completions", body)
        assert waited.status_code == 503 and waited.json()["error"]["code"] == "queue_timeout"
        slow = first.result()
    assert slow.status_code == 504 and slow.headers["x-should-retry"] == "false"
    stream = server.post("/v1/completions", body | {"stream": True})
    events = [line.removeprefix("data: ") for line in stream.text.split("\n\n") if line]
    assert stream.status_code == 200 and json.loads(events[-1])["error"]["code"] == "request_timeout"
    server.wait_until_idle()


@pytest.mark.slow
def test_requests_share_the_engine(start: Start) -> None:
    """Eight at once cost about as many forward passes as one, and each gets the text that it gets alone."""
    server = start(seconds=0.01, max_slots=8)
    bodies = [{"prompt": f"prompt {i}", "max_tokens": 12, "seed": i, "ignore_eos": True} for i in range(8)]
    alone = [server.complete(**body)["choices"][0]["text"] for body in bodies]
    before = server.service.worker.engine.model_runner.forwards
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: server.complete(**body)["choices"][0]["text"], bodies))
    assert together == alone
    assert server.service.worker.engine.model_runner.forwards - before < 8 * 12 / 2


def test_shared_prefixes_are_counted(start: Start) -> None:
    server = start()
    for _ in range(2):
        server.complete(prompt="the very same prompt", max_tokens=1)
    assert server.metric("prefix_cache_hit_tokens_total") >= 19
    assert server.metric("prompt_tokens_total") == 40


def test_a_failed_engine_fails_all_requests(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    server = start(seconds=0.02, max_slots=1)
    body = {"prompt": "a", "max_tokens": 90, "ignore_eos": True}
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(server.post, "/v1/completions", body | {"stream": i == 0}) for i in range(3)]
        wait_for(lambda: server.service.worker.reserved == 3 and server.service.worker.engine.n_running == 1)
        server.service.worker.engine.model_runner.model.broken = True  # type: ignore[attr-defined]
        answers = [answer.result() for answer in running]
    assert all("engine_dead" in answer.text for answer in answers)
    assert {answer.status_code for answer in answers} <= {200, 503}
    health = server.get("/health")
    assert health.status_code == 503 and health.json()["error"]["code"] == "engine_dead"
    assert server.post("/v1/completions", {"prompt": "a"}).status_code == 503
    assert server.metric("engine_up") == 0
    assert "RuntimeError" in caplog.text and "secret" not in caplog.text


@pytest.mark.slow
def test_draining_finishes_what_runs(start: Start) -> None:
    server = start(seconds=0.02, max_slots=2)
    body = {"prompt": "a", "max_tokens": 40, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.post, "/v1/completions", body)
        wait_for(lambda: server.service.worker.engine.n_running == 1)
        server.service.worker.draining = True
        assert server.get("/health").status_code == 503
        assert server.post("/v1/completions", body).json()["error"]["code"] == "shutting_down"
        assert running.result().json()["usage"]["completion_tokens"] == 40


def test_metrics_are_prometheus_text(server: Serving) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    server.complete(prompt="a", max_tokens=5, ignore_eos=True)
    families = {family.name for family in text_string_to_metric_families(server.get("/metrics").text)}
    wanted = {
        "requests_running", "requests_waiting", "cache_usage_ratio", "prefix_cache_hit_tokens", "prompt_tokens",
        "generation_tokens", "time_to_first_token_seconds", "time_per_output_token_seconds",
        "e2e_request_latency_seconds", "request_queue_time_seconds", "requests_rejected", "client_disconnects",
    }  # fmt: skip
    assert {f"lit_gpt:{name}" for name in wanted} <= families
    assert all(name.startswith("lit_gpt:") for name in families)
    assert server.metric("generation_tokens_total") >= 5


@pytest.mark.slow
def test_slow_and_disconnecting_clients_leave_no_state_behind(start: Start) -> None:
    """A short soak; `scripts/bench_serve.py soak` is the long one."""
    server = start(max_slots=4, limits=Limits(max_queue=8))
    right = {i: server.complete(prompt=f"p{i}", max_tokens=6, seed=i)["choices"][0]["text"] for i in range(6)}
    threads = threading.active_count()

    def one(i: int) -> bool:
        match i % 10:
            case 0 | 5:
                disconnect_after(server, {"prompt": "a", "max_tokens": 90, "stream": i % 2 == 0}, 0.01)
            case 1:
                return server.post("/v1/completions", content=b"{").status_code == 400
            case _:
                body = {"prompt": f"p{i % 6}", "max_tokens": 6, "seed": i % 6, "stream": False}
                answer = server.post("/v1/completions", body)
                return answer.status_code == 429 or answer.json()["choices"][0]["text"] == right[i % 6]
        return True

    with ThreadPoolExecutor(12) as pool:
        assert all(pool.map(one, range(80)))
    server.wait_until_idle()
    worker = server.service.worker
    assert not worker._prompts and not worker._unstarted and threading.active_count() <= threads + 1
    engine: Engine = worker.engine
    assert engine.slots.load == 0 and not engine.has_work
