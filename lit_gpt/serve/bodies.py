"""Request bodies: parsed and checked on a thread where they are large, and refused at the first problem.

pydantic would go on after an error and collect one for each of the items and the types they might have had: of a body
of 4 MiB that is gigabytes. So every list in `lit_gpt.serve.protocol` has a limit and ends at its first wrong item.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, get_type_hints

from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json

from lit_gpt.serve.api_errors import bad_request, from_pydantic

LARGE_BODY = 16 << 10
"""Bytes from which on a body is parsed on a thread: for smaller ones starting it takes longer."""

MAX_CONTAINERS = 50_000
"""Lists and objects in a body: each of them is an object of Python, of which a million take seconds to make."""

_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)

InThread = Callable[..., Awaitable[Any]]
"""Calls a function with arguments on a thread, and waits for its result."""


class _ParsedRequest(Request):
    """A request whose body has been parsed already: FastAPI takes a model of the right type as it is."""

    def __init__(self, request: Request, body: bytes, model: BaseModel) -> None:
        super().__init__(request.scope, request.receive)
        self._body = body
        self._model = model

    async def json(self) -> Any:
        """The model."""
        return self._model


def make_route_class(in_thread: InThread) -> type[APIRoute]:
    """A route whose body, the endpoint's parameter `body`, is read by `parse`; large ones by `in_thread`."""

    class BodyRoute(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            model = get_type_hints(self.endpoint).get("body")
            if model is None:
                return handle

            async def parse_first(request: Request) -> Response:
                body = await request.body()
                if not body or not _is_json(request.headers.get("content-type", "")):
                    return await handle(request)  # FastAPI refuses it
                job = partial(parse, model, body)
                parsed = await in_thread(job) if len(body) > LARGE_BODY else job()
                return await handle(_ParsedRequest(request, body, parsed))

            return parse_first

    return BodyRoute


def parse(model: type[BaseModel], body: bytes) -> BaseModel:
    """The body as `model`.

    Raises:
        ApiError: 400, naming the first problem.
    """
    if _containers(body) > MAX_CONTAINERS:
        raise bad_request(f"the body has more than {MAX_CONTAINERS} lists and objects: split it", code="invalid_body")
    try:
        value = from_json(body)
    except ValueError as error:  # which says where, and quotes nothing
        raise bad_request(f"the body is not valid JSON: {error}", code="invalid_json") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise from_pydantic(error.errors(include_url=False, include_context=False, include_input=False)) from None


def _containers(body: bytes) -> int:
    """Lists and objects in a JSON text; what is in strings counts only where that cannot make too many."""
    count = body.count(b"[") + body.count(b"{")
    if count > MAX_CONTAINERS:
        bare = _STRING.sub(b"", body)
        count = bare.count(b"[") + bare.count(b"{")
    return count


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
