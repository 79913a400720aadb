"""Connections that are opened and left alone lock nobody out: limits of their number and of the time for headers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import httpx
import pytest
from serving import Serving, wait_for

from lit_gpt.serve.connections import ConnectionLimits, allowed_connections

Start = Callable[..., Serving]
MANY = 12
BEGUN = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 99\r\n"


@contextmanager
def connected(server: Serving, count: int, data: bytes = b"") -> Iterator[list[socket.socket]]:
    """`count` connections on which `data` has been sent, and nothing more."""
    host, port = server.url.removeprefix("http://").split(":")
    with ExitStack() as stack:
        sockets = []
        for _ in range(count):
            each = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            each.sendall(data)
            sockets.append(each)
        yield sockets


def read_answer(connection: socket.socket) -> bytes:
    """An answer of `/health`."""
    data = b""
    while not data.endswith(b"}"):
        data += connection.recv(4096)
    return data


def is_closed(connection: socket.socket) -> bool:
    """Whether the server has closed it; waits for that, or for data, for as long as the socket's time-out."""
    try:
        return connection.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "data", [b"", b"GET /health HT", BEGUN, BEGUN + b"\r\n{"], ids=["none", "line", "head", "body"]
)
def test_idle_connections_lock_nobody_out(start: Start, data: bytes) -> None:
    server = start(connections=ConnectionLimits(max_connections=MANY), api_key=None)
    with connected(server, 3 * MANY, data):
        for _ in range(3):
            with httpx.Client(base_url=server.url, timeout=10) as client:
                assert client.get("/health").status_code == 200
                answer = client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2})
                assert answer.status_code == 200
    assert server.metric('requests_rejected_total{reason="too_many_connections"}') > 0


@pytest.mark.slow
@pytest.mark.parametrize("data", [b"", b"GET /health HT", BEGUN], ids=["none", "line", "head"])
def test_headers_have_a_time_limit(start: Start, data: bytes) -> None:
    server = start(connections=ConnectionLimits(header_seconds=0.3))
    with connected(server, 2, data) as sockets:
        assert all(is_closed(each) for each in sockets)
    assert server.metric('requests_rejected_total{reason="slow_headers"}') == 2


@pytest.mark.slow
def test_headers_of_a_second_request_have_it_too(start: Start) -> None:
    """A byte ends uvicorn's own limit of the time between requests."""
    server = start(connections=ConnectionLimits(header_seconds=0.3))
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connected(server, 1, whole) as (connection,):
        assert read_answer(connection).startswith(b"HTTP/1.1 200 OK")
        time.sleep(0.6)  # between requests it may wait for longer
        connection.sendall(whole)
        assert read_answer(connection).startswith(b"HTTP/1.1 200 OK")
        connection.sendall(b"GET /he")
        assert is_closed(connection)


@pytest.mark.slow
def test_a_connection_that_is_being_answered_is_not_closed_for_a_new_one(start: Start) -> None:
    server = start(seconds=0.05, connections=ConnectionLimits(max_connections=2, header_seconds=0.3))
    body = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}

    def complete() -> int:
        with httpx.Client(base_url=server.url, timeout=20) as client:
            return client.post("/v1/completions", json=body).status_code

    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(complete) for _ in range(2)]
        wait_for(lambda: server.service.worker.engine.n_running == 2)
        with httpx.Client(base_url=server.url) as third:
            refused = third.get("/health")
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "too_many_connections")
        assert [each.result() for each in running] == [200, 200]
    assert server.get("/health").status_code == 200


@pytest.mark.slow
def test_a_request_that_has_come_is_not_closed_unread(start: Start) -> None:
    """It was reset: the loop accepts all connections that wait before it reads from the first (torture.py, serve)."""
    server = start(connections=ConnectionLimits(max_connections=4))
    loop = server.uvicorn.servers[0].get_loop()
    loop.call_soon_threadsafe(time.sleep, 0.3)
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connected(server, 1, whole) as (first,), connected(server, 8):
        assert read_answer(first).startswith(b"HTTP/1.1 200")
    assert server.metric('requests_rejected_total{reason="too_many_connections"}') > 0


@pytest.mark.slow
def test_a_client_that_does_not_read_loses_its_connection(start: Start) -> None:
    limits = ConnectionLimits(header_seconds=0.3, close_seconds=0.3)
    server = start(connections=limits, max_slots=1)
    text = b'{"prompt": "%s", "return_token_strs": true}' % (b"x" * 1_500_000)
    head = b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    host, port = server.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(10)
        connection.connect((host, int(port)))
        connection.sendall(head + b"Content-Length: %d\r\n\r\n" % len(text) + text)
        wait_for(lambda: server.uvicorn.server_state.total_requests > 0)
        wait_for(lambda: not server.uvicorn.server_state.connections, seconds=8)
    assert server.get("/health").status_code == 200


def test_no_more_connections_than_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 4096))
    assert allowed_connections(ConnectionLimits()) == 192
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert allowed_connections(ConnectionLimits()) == 1000
