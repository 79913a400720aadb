"""JSON files of a folder of shards that come from elsewhere or may be damaged: read in bounded time and memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lit_gpt.errors import UserError

MAX_JSON_BYTES = 1 << 23  # of an index or a state: 8 MiB are some 35,000 shards
BYTES_PER_NESTING = 32  # one list or object for fewer bytes than these is no index: "[[],[],[]" takes 30 times its size


def read_limited(path: Path, remedy: str) -> bytes:
    """A file's content, or so much of it that `parse_small_json` refuses the rest.

    Args:
        path: of the file.
        remedy: ends the message.

    Raises:
        UserError: it cannot be read.
    """
    try:
        if not path.is_file():  # to open a named pipe would wait for ever
            raise FileNotFoundError(0, "not there, or not a file")
        with path.open("rb") as file:
            return file.read(MAX_JSON_BYTES + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {remedy}") from error


def parse_small_json(data: bytes, where: str, remedy: str) -> dict[str, Any]:
    """The object that some bytes of JSON are.

    Args:
        data: the content of a file.
        where: its path or address, for the message.
        remedy: ends the message.

    Raises:
        UserError: too large, not UTF-8, not JSON, nested too deeply, or not an object.
    """
    if len(data) > MAX_JSON_BYTES:
        raise UserError(f"{where}: larger than {MAX_JSON_BYTES} bytes, so it is not ours; {remedy}")
    if data.count(b"{") + data.count(b"[") > 1000 + len(data) // BYTES_PER_NESTING:
        raise UserError(f"{where}: JSON of far too many lists and objects, so it is not ours; {remedy}")
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}, so it is damaged; {remedy}") from error
    except RecursionError as error:
        raise UserError(f"{where}: JSON nested too deeply; {remedy}") from error
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: not a JSON object but {type(values).__name__}; {remedy}")
    return values


def shown(error: BaseException | str) -> str:
    """A text that may hold something of the file, for a message: one line, nothing that steers a terminal, not long."""
    return "".join(character if character.isprintable() else "�" for character in str(error)[:200])
