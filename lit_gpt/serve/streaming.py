"""Streaming and JSON responses that stop when the client disconnects."""

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
from lit_gpt.serve.middleware import failure_location
from lit_gpt.serve.prometheus import Metrics

log = logging.getLogger("lit_gpt.serve")

T = TypeVar("T")


class ClientDisconnected(Exception):
    """The client disconnected before its response was complete."""


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T], on_disconnect: Callable[[], None]) -> T:
    """The result of `work`, which is cancelled at once when the client disconnects.

    Raises:
        ClientDisconnected: after calling `on_disconnect`.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        on_disconnect()
        raise ClientDisconnected
    finally:
        for each in (task, watch):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


class EventStream(Response):
    """OpenAI's server-sent events: `data: {chunk}` each, `data: [DONE]` at the end.

    The first chunk is made before the headers are sent, so that what fails before (a full queue, a failed engine) has
    its proper status; what fails later is an error event, after which the stream ends without `[DONE]`.

    Args:
        chunks: closed when the client disconnects, which frees its slots.
        finish: called at the very end, whatever happened.
        seconds: for the whole stream: the connection to a slower reader is dropped.
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
        """Send all events, or stop when the client disconnects."""
        try:
            async with asyncio.timeout(self.seconds):
                await run_until_disconnect(receive, self.write(scope, receive, send), self.metrics.disconnects.inc)
        except ClientDisconnected:
            pass
        except TimeoutError:  # a client that does not read: an unfinished response drops its connection
            self.metrics.disconnects.inc()
        finally:
            await self.chunks.aclose()
            self.finish()

    async def write(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send headers and events; errors as status or event, as the class describes."""
        try:
            chunk: dict[str, Any] | None = await anext(self.chunks)
        except ApiError as error:
            return await error.response()(scope, receive, send)
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            while chunk is not None:
                await send({"type": "http.response.body", "body": event(chunk), "more_body": True})
                chunk = await anext(self.chunks, None)
            last = b"data: [DONE]\n\n"
        except ApiError as error:
            last = event(error.body())
        except Exception as error:
            log.error("a stream failed: %s", failure_location(error))
            last = event(ApiError(500, "the server failed", code="internal_error").body())
        await send({"type": "http.response.body", "body": last})


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def json_response(request: Request, work: Coroutine[Any, Any, dict[str, Any]], metrics: Metrics) -> Response:
    """The result of `work` as JSON; `work` is cancelled if the client disconnects first."""
    try:
        result = await run_until_disconnect(request.receive, work, metrics.disconnects.inc)
    except ClientDisconnected:
        return Response(status_code=499)  # the client does not read it; the log shows it
    body = json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode()
    return Response(body, media_type="application/json")
