"""One input file of a preparation: where it is, what the user calls it, and which field of it holds the text."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lit_gpt.errors import UserError

COMPRESSION_SUFFIXES = frozenset({".gz", ".zst"})

OnRead = Callable[[int], None]
"""Called with each number of bytes read."""


class BadText(UserError):
    """Text that is wrong for good: reading it once more gives the same. A file that is not there may come back."""


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
        """Bytes on disk. Raises UserError if it is gone."""
        return self._status().st_size

    @property
    def fingerprint(self) -> list[str | int]:
        """What tells this input from another; of an address only the address. Raises UserError if it is gone."""
        if self.url:
            return [self.url]
        status = self._status()
        return [str(self.path.resolve()), status.st_size, status.st_mtime_ns]

    def _status(self) -> os.stat_result:
        try:
            return self.path.stat()
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read ({error.strerror}); put it back and run again") from error
