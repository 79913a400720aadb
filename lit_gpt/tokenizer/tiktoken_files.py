"""tiktoken's named encodings: from its cache, under a name with the same ids, or by a download with a timeout."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tiktoken

from lit_gpt.errors import UserError

SAME_IDS = {"gpt2": ("gpt2", "r50k_base")}  # encodings with the same ids
OFFLINE = 'offline there are "byte", "char" and "bpe:4096"'
CONNECT_SECONDS, READ_SECONDS = 10, 60


class _NotCached(Exception):
    """A file of tiktoken's is not in its cache."""


def named_encoding(name: str) -> tiktoken.Encoding:
    """The named encoding, or one with its ids, from tiktoken's cache, and else by download."""
    for same in SAME_IDS.get(name, (name,)):
        try:
            with _reading_by(_refuse):
                return tiktoken.get_encoding(same)
        except _NotCached:
            pass
    try:
        with _reading_by(_download):
            return tiktoken.get_encoding(name)
    except Exception as error:
        raise UserError(
            f'tokenizer "{name}" is not on this machine and could not be downloaded ({type(error).__name__}): '
            f"set TIKTOKEN_CACHE_DIR to a folder that holds tiktoken's files; {OFFLINE}"
        ) from error


_reading_lock = threading.Lock()


@contextmanager
def _reading_by(read: Callable[[str], bytes]) -> Iterator[None]:
    """Let tiktoken get what its cache lacks by `read`: its own download has no timeout and can hang for ever."""
    import tiktoken.load

    with _reading_lock:
        original = tiktoken.load.read_file
        tiktoken.load.read_file = read  # type: ignore[assignment]
        try:
            yield
        finally:
            tiktoken.load.read_file = original


def _refuse(url: str) -> bytes:
    raise _NotCached(url)


def _download(url: str) -> bytes:
    import requests  # tiktoken depends on it

    response = requests.get(url, timeout=(CONNECT_SECONDS, READ_SECONDS))
    response.raise_for_status()
    return response.content
