"""JSON files that hold one object, read without taking much more memory than the largest that are in use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError

MAX_BYTES = 64 << 20
"""Of a file; tokenizers of 200,000 ids have up to 20 MB."""
MAX_ITEMS = 1 << 21
"""Of all lists and objects in a file together; such tokenizers have a million."""


def parse_json(content: bytes) -> Any:
    """The JSON value in `content`. Raises ValueError if it is damaged, too long or nested too deeply."""
    items = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if len(content) > MAX_BYTES or items > MAX_ITEMS:
        raise ValueError(f"{len(content)} bytes with some {items} values, which is too long")
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_limited(path: Path) -> bytes:
    """The content of `path`. Raises OSError, and ValueError if it has more than `MAX_BYTES`."""
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES} bytes")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises UserError if it is missing, damaged or something else."""
    try:
        values = parse_json(read_limited(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({str(error)[:200]}): get it again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: get it again")
    return values


def read_text(path: Path) -> str:
    """The text in `path`. Raises UserError if it is missing, too long or not UTF-8."""
    try:
        return read_limited(path).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({str(error)[-200:]}): get it again") from None
