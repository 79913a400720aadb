"""Limits of connections, before any header is read: how many there are, and how long their headers may take.

uvicorn has a time limit between requests, but none for the headers of a request, and none for a client that does not
read what it is sent while the connection is being closed. A few hundred connections that are opened and left alone
then use up the process's files, and nobody else gets in.
"""

from __future__ import annotations

import asyncio
import select
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

from lit_gpt.serve.prometheus import Metrics

_SPARE_FILES = 64
"""Open files that are no connections: the model, the log, the page."""

_REFUSAL = (
    b'{"error":{"message":"too many connections: try again","type":"server_error","param":null,'
    b'"code":"too_many_connections"}}'
)
_REFUSED = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nRetry-After: 1\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_REFUSAL), _REFUSAL)
)


@dataclass(frozen=True)
class ConnectionLimits:
    """What a client may do to a connection.

    Attributes:
        max_connections: open at once. Above it the one that has kept the server waiting longest is closed, and that
            is none of which something has come that was not read yet; if every one of them is being answered, the new
            one gets 503.
        header_seconds: from the connection, or from a later request's first byte, to the end of the headers.
        close_seconds: for what is still to be sent when a connection is closed.
    """

    max_connections: int = 1000
    header_seconds: float = 10.0
    close_seconds: float = 30.0


def allowed_connections(limits: ConnectionLimits) -> int:
    """`max_connections`, or as many as this process may open files, less a few for itself."""
    try:
        import resource
    except ImportError:  # no such limit on this system
        return limits.max_connections
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if files == resource.RLIM_INFINITY:
        return limits.max_connections
    return max(1, min(limits.max_connections, files - _SPARE_FILES))


class Connections:
    """The open connections of a server."""

    def __init__(self, limits: ConnectionLimits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.most = allowed_connections(limits)
        self._open: set[Any] = set()
        self._sweeping = False

    def add(self, connection: Any) -> None:
        """A new connection; at the limit another is closed for it, or it is refused."""
        self._open.add(connection)
        if not self._sweeping:
            self._sweeping = True
            asyncio.get_running_loop().call_later(self._interval, self._sweep)
        if len(self._open) <= self.most:
            return
        waiting = [each for each in self._open if each.waits_for_client and each is not connection]
        self.metrics.rejected.labels("too_many_connections").inc()
        if waiting:
            longest = min(waiting, key=_waiting_since)
            if longest.has_unread:
                silent = (each for each in sorted(waiting, key=_waiting_since) if not each.has_unread)
                longest = next(silent, longest)
            self._open.discard(longest)  # now: the loop may accept more before it tells that this one is closed
            longest.transport.abort()
        else:
            connection.transport.write(_REFUSED)
            connection.transport.close()

    def discard(self, connection: Any) -> None:
        """It is closed."""
        self._open.discard(connection)

    @property
    def _interval(self) -> float:
        return min(1.0, self.limits.header_seconds / 4)

    def _sweep(self) -> None:
        """Close connections whose time is over: one timer for all, instead of one for every request."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for each in list(self._open):
            if each.transport.is_closing():
                each.closing_since = each.closing_since or now
                if now - each.closing_since > self.limits.close_seconds:
                    each.transport.abort()  # `close` waits until all is sent, for a client that may never read it
            elif each.headers_since is not None and now - each.headers_since > self.limits.header_seconds:
                self.metrics.rejected.labels("slow_headers").inc()
                each.transport.close()
        self._sweeping = bool(self._open)
        if self._sweeping:
            loop.call_later(self._interval, self._sweep)


_BASE: Any = AutoHTTPProtocol


class LimitedProtocol(_BASE):
    """One connection.

    Attributes:
        limited: all of the server's connections.
        since: when it was made, or its latest request began or was answered.
        headers_since: since when headers are awaited, or None while a request is handled and between requests.
        closing_since: when the sweep first found it being closed.
    """

    limited: Connections
    since = 0.0
    headers_since: float | None = None
    closing_since: float | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being handled."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def waits_for_client(self) -> bool:
        """Whether headers, or the rest of a body, have not come yet."""
        return self.is_idle or self.cycle.more_body

    @property
    def has_unread(self) -> bool:
        """Whether bytes have come that were not read yet: the loop accepts many connections before it reads again."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open; the time for headers begins."""
        super().connection_made(transport)
        self.since = self.headers_since = self.loop.time()
        self.limited.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is closed."""
        self.limited.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes have come: of headers, whose time begins with the first of them, or of a body."""
        was_idle = self.is_idle
        super().data_received(data)
        if not self.is_idle:
            self.headers_since = None
            self.since = self.loop.time() if was_idle else self.since
        elif self.headers_since is None:
            self.headers_since = self.loop.time()

    def on_response_complete(self) -> None:
        """A request is answered: until the next byte, uvicorn's time limit between requests holds."""
        super().on_response_complete()
        if self.is_idle:  # and not at a request that was sent ahead
            self.since, self.headers_since = self.loop.time(), None


def _waiting_since(connection: LimitedProtocol) -> float:
    return connection.since


def limited_protocol(limits: ConnectionLimits, metrics: Metrics) -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, of whichever parser is installed, with `limits`."""
    return type("ServedProtocol", (LimitedProtocol,), {"limited": Connections(limits, metrics)})
