"""Chat templates, rendered in a process of their own that is ended when one takes too long."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

_PROGRAM = Path(__file__).parent / "render_template.py"


class TemplateFailed(Exception):
    """A template refuses the conversation, fails, or does not end."""


class TemplateRenderer:
    """Renders templates in a child process, one at a time; the child is started when it is first needed.

    Attributes:
        seconds: how long a template may take.
        start_seconds: how long a child may take to start, besides.
    """

    def __init__(self, seconds: float = 2.0, start_seconds: float = 20.0) -> None:
        self.seconds, self.start_seconds = seconds, start_seconds
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text that `template` makes of `variables`, plain JSON values. Blocks: to be called on a thread.

        Raises:
            TemplateFailed: with the reason, one line.
        """
        request = json.dumps({"template": template, "variables": variables, "seconds": self.seconds})
        with self._lock:
            line = self._ask(request)
            if not line:
                self._end()
                raise TemplateFailed(f"it did not end within {self.seconds:g} s, or needed too much memory")
        result = json.loads(line)
        if "error" in result:
            raise TemplateFailed(" ".join(result["error"].split()))
        return str(result["text"])

    def _ask(self, request: str) -> str:
        """The child's answer; "" if it ends instead, which the watching thread sees to if its own alarm does not."""
        fresh = self._child is None or self._child.poll() is not None
        child = self._child = self._start() if fresh or self._child is None else self._child
        assert child.stdin is not None and child.stdout is not None
        watch = threading.Timer(self.seconds + (self.start_seconds if fresh else 1.0), child.kill)
        watch.daemon = True
        watch.start()
        try:
            child.stdin.write(request + "\n")
            child.stdin.flush()
            return child.stdout.readline()
        except OSError:  # it has ended
            return ""
        finally:
            watch.cancel()

    def _start(self) -> subprocess.Popen[str]:
        # -P: neither its own folder nor the current one is searched for modules
        command = [sys.executable, "-P", str(_PROGRAM)]
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True, encoding="utf-8")

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
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
