"""Errors in OpenAI's format: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is refused.

    Attributes:
        status: HTTP status.
        param: the field that is wrong, if there is one.
        code: a short name that programs can test for.
        headers: sent along, as `Retry-After`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = str(self).encode("utf-8", "replace").decode()  # a lone surrogate quoted from the request has no UTF-8
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The HTTP response."""
        return JSONResponse(self.body(), status_code=self.status, headers=self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400."""
    return ApiError(400, message, param, code)


def from_http_exception(error: HTTPException) -> ApiError:
    """An error of the framework itself: an unknown path, a wrong method, a body that is no text."""
    if error.status_code == 404:
        return ApiError(404, "no such path: see /openapi.json", code="not_found")
    if error.status_code == 405:
        text = "this path does not take that method"
        return ApiError(405, text, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, "the request could not be read", code="invalid_body", headers=error.headers)


def from_validation_error(error: RequestValidationError) -> ApiError:
    """FastAPI's 422 list as one OpenAI 400: the first problem, in words, with the field's name as `param`.

    pydantic's own text quotes no input, and neither does this: an error body may be written to a log.
    """
    return from_pydantic(error.errors())


def from_pydantic(problems: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first of pydantic's problems, as `from_validation_error` puts it."""
    first = problems[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    kind = str(first["type"])
    if kind == "json_invalid":
        return bad_request("the body is not valid JSON", code="invalid_json")
    if not where and kind == "value_error":
        return bad_request(str(first["msg"]).removeprefix("Value error, "), code="invalid_body")
    if not where:
        return bad_request(
            "the body must be a JSON object sent with Content-Type: application/json", code="invalid_body"
        )
    name = where[0]
    if kind == "extra_forbidden":
        return bad_request(f"{'.'.join(where)} is not supported: leave it out", name, "unsupported_parameter")
    if kind == "missing":
        return bad_request(f"{'.'.join(where)} is missing", name, "missing_parameter")
    if name == "prompt":
        return bad_request(
            "prompt must be a string, a list of strings, a list of token ids, or a list of such lists", name
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    field = ".".join(where) if len(problems) == 1 else name
    return bad_request(f"{field}: {message}", name, "invalid_value")
