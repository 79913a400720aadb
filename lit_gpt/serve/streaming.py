"""Answers that notice when nobody is listening any more: server-sent events, and plain JSON."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lit_gpt.serve.api_errors import ApiError
from lit_gpt.serve.middleware import where_it_failed
from lit_gpt.serve.prometheus import Metrics

log = logging.getLogger("lit_gpt.serve")

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


async def until_left(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(receive: Receive, work: Coroutine[Any, Any, T], on_leaving: Callable[[], None]) -> T:
    """The result of `work`, which is cancelled at once when the client goes.

    Raises:
        ClientLeft: it has gone.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(until_left(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        on_leaving()
        raise ClientLeft
    finally:
        for each in (task, watch):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """OpenAI's server-sent events: `data: {chunk}` each, `data: [DONE]` at the end.

    The first chunk is made before the headers are sent, so that what fails until then (a full queue, a dead engine) has
    its proper status; what fails later is an error event, after which the stream ends without `[DONE]`.

    Args:
        chunks: closed when the client goes, which frees the slots behind it.
        finish: called at the very end, however it came about.
        seconds: for the whole stream: a reader that is slower than that loses it.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        chunks: AsyncGenerator[dict[str, Any], None],
        metrics: Metrics,
        finish: Callable[[], None],
        seconds: float,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.chunks, self.metrics, self.finish, self.seconds = chunks, metrics, finish, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop where the client does."""
        try:
            async with asyncio.timeout(self.seconds):
                await unless_left(receive, self.write(scope, receive, send), self.metrics.disconnects.inc)
        except ClientLeft:
            pass
        except TimeoutError:  # it did not read: the connection is dropped by leaving the answer unfinished
            self.metrics.disconnects.inc()
        finally:
            await self.chunks.aclose()
            self.finish()

    async def write(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Headers, events, end."""
        try:
            chunk: dict[str, Any] | None = await anext(self.chunks)
        except ApiError as fault:
            return await fault.response()(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while chunk is not None:
                await send({"type": "http.response.body", "body": event(chunk), "more_body": True})
                chunk = await anext(self.chunks, None)
            last = b"data: [DONE]\n\n"
        except ApiError as fault:
            last = event(fault.body())
        except Exception as error:
            log.error("a stream failed: %s", where_it_failed(error))
            last = event(ApiError(500, "the server failed", code="internal_error").body())
        await send({"type": "http.response.body", "body": last})


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def answer(request: Request, work: Coroutine[Any, Any, dict[str, Any]], metrics: Metrics) -> Response:
    """The result of `work` as JSON, unless the client goes first: then the work stops."""
    try:
        result = await unless_left(request.receive, work, metrics.disconnects.inc)
    except ClientLeft:
        return Response(status_code=499)  # nobody reads it; the log shows it
    body = json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(body, media_type="application/json")
