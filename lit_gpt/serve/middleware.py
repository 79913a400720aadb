"""ASGI middleware: request log, checks of host, origin and API key, limits of request bodies.

It is pure ASGI because starlette's BaseHTTPMiddleware hides disconnects.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import time
import traceback
from collections.abc import Iterable
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lit_gpt.serve.api_errors import ApiError
from lit_gpt.serve.prometheus import Metrics

log = logging.getLogger("lit_gpt.serve")

MAX_BODY_BYTES = 4 << 20
"""Enough for hundreds of full contexts in one request."""

BODY_SECONDS = 30.0
"""A body must have arrived by then: a slow one would hold its connection."""

MAX_HELD_BYTES = 64 << 20
"""Of all bodies together that are being read or answered; beyond it a new one is refused with 503."""

_DISCARD_FACTOR = 8
"""A body of up to so many times the limit is read to its end and dropped, before it is refused."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_OPEN_PATHS = ("/health", "/page/", "/favicon.ico")

REQUEST_ID: ContextVar[str] = ContextVar("REQUEST_ID", default="none")
"""The id of the HTTP request that the current task answers, for the log."""

_HEADERS = {
    # No inline script or style, nothing from other origins, no framing: the page runs only the files of the package.
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RequestLog:
    """Outermost: gives the request an id, logs one line, sets security headers, answers 500 to uncaught exceptions.

    The line holds ids, counts and times, never a prompt; everything that a client chose is escaped, so that a path
    with line breaks in it cannot forge a second line.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        REQUEST_ID.set(request_id)
        state = scope.setdefault("state", {})
        fields: dict[str, object] = {}
        state["log"] = fields
        started, status = time.perf_counter(), 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:
            log.error("request=%s failed: %s", request_id, failure_location(error))
            if not status:
                failure = ApiError(500, "the server failed: its log has the request id", code="internal_error")
                await failure.response()(scope, receive, send_with_headers)
        finally:
            counts = "".join(f" {name}={value}" for name, value in fields.items())
            path = ascii(scope["path"])[1:-1][:100]
            elapsed_ms = 1000 * (time.perf_counter() - started)
            log.info(
                "request=%s %s %s status=%d ms=%.0f%s", request_id, scope["method"], path, status, elapsed_ms, counts
            )


def failure_location(error: BaseException) -> str:
    """Type and traceback of an exception in one line; without its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in reversed(frames))
    return f"{type(error).__name__} at {lines}"


class AccessControl:
    """Checks of Host, Origin and API key.

    A page of another site can point its own name at 127.0.0.1 (DNS rebinding) or send requests across origins; both
    show in the headers. A host that is a plain address cannot be rebound, so only names are checked.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, api_key: str | None, allowed_hosts: Iterable[str]) -> None:
        self.app, self.metrics = app, metrics
        self.key_digest = None if api_key is None else hashlib.sha256(api_key.encode()).digest()
        self.allowed_hosts = {"localhost", *(host.lower() for host in allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] == "http":
            error = self.refusal(scope)
            if error is not None:
                self.metrics.rejected.labels(str(error.code)).inc()
                return await error.response()(scope, receive, send)
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> ApiError | None:
        """The error to answer with, or None if the request may pass."""
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self.is_own_host(hosts[0]):
            return ApiError(403, "this Host is not served here: start with --allowed_hosts NAME", code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in {f"{s}://{hosts[0].lower()}" for s in ("http", "https")}:
            return ApiError(403, "requests from other origins are not served", code="unknown_origin")
        if self.key_digest is None or needs_no_key(scope["path"]):
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
        if scheme.lower() == "bearer" and hmac.compare_digest(digest, self.key_digest):
            return None
        return ApiError(
            401,
            "a valid API key is needed: send Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )

    def is_own_host(self, host: str) -> bool:
        """Whether a Host header names this server.

        >>> access = AccessControl(None, None, None, ["gpt.example"])
        >>> [access.is_own_host(host) for host in ("127.0.0.1:8000", "[::1]:80", "gpt.example", "evil.example")]
        [True, True, True, False]
        """
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in self.allowed_hosts or "*" in self.allowed_hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


def needs_no_key(path: str) -> bool:
    """Whether a path needs no key: the health check, and the page's own files."""
    return path == "/" or path.startswith(_OPEN_PATHS)


class Holding:
    """The bytes that one request holds of all that `limit` allows.

    Attributes:
        size: bytes of its body.
    """

    def __init__(self, limit: BodyLimit) -> None:
        self.limit, self.size = limit, 0

    def add(self, size: int) -> None:
        """Hold `size` more.

        Raises:
            ApiError: 503 if all bodies together are too large.
        """
        if self.limit.held + size > self.limit.max_held:
            text = "the server holds too many large bodies: try again in 1 s"
            raise ApiError(503, text, code="bodies_too_large", headers={"Retry-After": "1"})
        self.limit.held += size
        self.size += size


class BodyLimit:
    """Reads the whole body before the route runs: at most so many bytes, in at most so many seconds.

    Attributes:
        held: bytes of the bodies that are being read or answered.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        max_bytes: int = MAX_BODY_BYTES,
        seconds: float = BODY_SECONDS,
        max_held: int = MAX_HELD_BYTES,
    ) -> None:
        self.app, self.metrics, self.max_bytes, self.seconds, self.max_held = app, metrics, max_bytes, seconds, max_held
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD"):
            return await self.app(scope, receive, send)
        holding = Holding(self)
        try:
            await self.read_and_run(scope, receive, send, holding)
        finally:
            self.held -= holding.size

    async def read_and_run(self, scope: Scope, receive: Receive, send: Send, holding: Holding) -> None:
        """Read the body, and run the route with it."""
        try:
            async with asyncio.timeout(self.seconds):
                body = await self.read(scope, receive, holding)
        except TimeoutError:
            return await self.refuse(ApiError(408, "the body did not arrive in time", code="slow_body"), scope, send)
        except ApiError as error:
            return await self.refuse(error, scope, send)
        if body is None:  # the client disconnected before its body was complete
            self.metrics.disconnects.inc()
            return
        first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return first.pop() if first else await receive()

        await self.app(scope, replay, send)

    async def read(self, scope: Scope, receive: Receive, holding: Holding) -> bytes | None:
        """The body, or None if the client disconnected.

        What is too large is still read, and dropped, up to a point: a client that is cut off while it sends would see a
        broken connection and not the answer.
        """
        too_large = ApiError(413, f"the body is larger than {self.max_bytes} bytes: split it", code="body_too_large")
        length = Headers(scope=scope).get("content-length", "0")
        most = _DISCARD_FACTOR * self.max_bytes
        if length.isdecimal() and int(length) > most:
            raise too_large
        parts, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self.max_bytes:
                holding.add(len(part))
                parts.append(part)
            elif size > most:
                raise too_large
        if size > self.max_bytes:
            raise too_large
        return b"".join(parts)

    async def refuse(self, error: ApiError, scope: Scope, send: Send) -> None:
        """Answer and close: to keep the connection, the rest of the body would have to be read first."""
        self.metrics.rejected.labels(str(error.code)).inc()
        error.headers["Connection"] = "close"

        async def nothing() -> Message:
            return {"type": "http.disconnect"}

        await error.response()(scope, nothing, send)
