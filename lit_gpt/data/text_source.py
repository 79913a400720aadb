"""One input file of a preparation: where it is, what the user calls it, and which field of it holds the text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

COMPRESSION_SUFFIXES = frozenset({".gz", ".zst"})

OnRead = Callable[[int], None]
"""Called with each number of bytes read."""


@dataclass(frozen=True)
class TextSource:
    """One input file.

    Attributes:
        path: on this machine.
        name: as the user knows it; errors use it.
        text_field: the field that holds the text, where the file has fields (.jsonl, .csv, .parquet).
        url: where it is to be fetched from first, if it is not here.
    """

    path: Path
    name: str
    text_field: str = "text"
    url: str | None = None

    @property
    def compression(self) -> str | None:
        """ ".gz", ".zst", or None where the file is not compressed."""
        return self.path.suffix.lower() if self.path.suffix.lower() in COMPRESSION_SUFFIXES else None

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, in lower case: ".jsonl" of `x.jsonl.gz`."""
        path = self.path.with_suffix("") if self.compression else self.path
        return path.suffix.lower()

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.path.stat().st_size

    @property
    def fingerprint(self) -> list[str | int]:
        """What tells this input from another; of an address only the address."""
        if self.url:
            return [self.url]
        status = self.path.stat()
        return [str(self.path.resolve()), status.st_size, status.st_mtime_ns]
