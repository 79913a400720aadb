"""Messages on stderr: stdout holds results only."""

from __future__ import annotations

import sys


def note(message: str) -> None:
    """Print one line of progress or remark to stderr."""
    print(message, file=sys.stderr, flush=True)
