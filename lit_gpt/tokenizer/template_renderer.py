"""Chat templates, rendered in a process of their own that is ended when one takes too long."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).parent / "render_template.py"
_PIECE = 1 << 16  # bytes that are written to a pipe, or read from one, at once


class TemplateFailed(Exception):
    """A template refuses the conversation, fails, or does not end."""


class TemplateRenderer:
    """Renders templates in a child process, one at a time; the child is started when it is first needed.

    Threads may share one. A copy of this process (`fork`) starts a child of its own.

    Attributes:
        seconds: how long a template may take.
        start_seconds: how long a child may take to start, besides.
    """

    def __init__(self, seconds: float = 2.0, start_seconds: float = 20.0) -> None:
        self.seconds, self.start_seconds = seconds, start_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = os.getpid()
        self._lock = threading.Lock()

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text that `template` makes of `variables`, plain JSON values. Blocks: to be called on a thread.

        Raises:
            TemplateFailed: with the reason, one line.
        """
        return self.render_all(template, [variables])[0]

    def render_all(
        self, template: str, renderings: Sequence[dict[str, Any]], generation_marks: tuple[str, str] = ("", "")
    ) -> list[str]:
        """The texts that `template` makes of each of `renderings`, in one exchange with the child.

        Args:
            template: its source.
            renderings: variables of each, plain JSON values.
            generation_marks: what to write where `{% generation %}` begins and ends, in all renderings but the first.

        Raises:
            TemplateFailed: if one of them fails, with the reason, one line.
        """
        values = {
            "template": template,
            "renderings": list(renderings),
            "marks": generation_marks,
            "seconds": self.seconds,
        }
        request = json.dumps(values).encode() + b"\n"
        if self._owner != os.getpid():  # a fork: the child answers the process that started it
            self._child, self._owner, self._lock = None, os.getpid(), threading.Lock()
        with self._lock:
            try:
                line = self._ask(request)
            except BaseException:  # Ctrl-C: what is still to come would be read as the next request's answer
                self._end()
                raise
            if not line:
                self._end()
                raise TemplateFailed(f"it did not end within {self.seconds:g} s, or needed too much memory")
        result = json.loads(line)
        if "error" in result:
            raise TemplateFailed(" ".join(result["error"].split()))
        return result["texts"]

    def _ask(self, request: bytes) -> bytes:
        """The child's answer; b"" if it ends instead, or is late, which its own alarm has not prevented then."""
        fresh = self._child is None or self._child.poll() is not None
        child = self._child = self._start() if fresh or self._child is None else self._child
        return _exchange(child, request, self.seconds + (self.start_seconds if fresh else 1.0))

    def _start(self) -> subprocess.Popen[bytes]:
        # -P: neither its own folder nor the current one is searched for modules
        command = [sys.executable, "-P", str(_PROGRAM)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, bufsize=0)

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None and self._owner == os.getpid():
            child.kill()
            child.wait()
            for stream in (child.stdin, child.stdout):
                with suppress(OSError):
                    if stream is not None:
                        stream.close()

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()


def _exchange(child: subprocess.Popen[bytes], request: bytes, seconds: float) -> bytes:
    """What `child` writes, to the end of the line, after it has been sent `request`; b"" if it ends or is late.

    It waits for both pipes at once, so that a child that has stopped reading is noticed too. By `poll`, as the
    numbers of a server's files can be larger than `select` takes.
    """
    assert child.stdin is not None and child.stdout is not None
    to_child, from_child = child.stdin.fileno(), child.stdout.fileno()
    os.set_blocking(to_child, False)
    poll = select.poll()
    poll.register(to_child, select.POLLOUT)
    poll.register(from_child, select.POLLIN)
    left, answer, deadline = memoryview(request), bytearray(), time.monotonic() + seconds
    try:
        while not answer.endswith(b"\n"):
            ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
            if not ready:
                return b""
            if to_child in ready and left:
                left = left[os.write(to_child, left[:_PIECE]) :]
                if not left:
                    poll.unregister(to_child)
            if from_child in ready:
                data = os.read(from_child, _PIECE)
                if not data:
                    return b""
                answer += data
    except OSError:  # it has ended
        return b""
    return bytes(answer)
