"""A program of its own that renders chat templates: requests on stdin, answers on stdout, one JSON object a line.

A template is a program that came with a checkpoint. Jinja's sandbox keeps it from files and objects, but not from
loops that never end or strings that fill the memory, and no thread can be stopped. So it runs in this process, which
the operating system ends: after `seconds` by an alarm, whatever is being computed, and beyond `MAX_BYTES` of memory.

It is run by its path and imports nothing of lit_gpt, so that it starts fast.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 1 << 30
"""Address space of this process."""

MAX_CHARACTERS = 16 << 20
"""Of a rendered conversation; a request's body is smaller."""


@lru_cache(maxsize=4)
def compile_template(source: str) -> Any:
    """The template of that source."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: time.strftime(form)
    return environment.from_string(source)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """`text`, or `error` with what the template says; an error of another kind by its type only."""
    try:
        text = compile_template(request["template"]).render(**request["variables"])
    except Exception as error:  # a template can fail in any way
        return {"error": str(error)[:1000] if isinstance(error, TemplateError) else type(error).__name__}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it makes {len(text)} characters of them"}
    return {"text": text}


def main() -> None:
    """Answer requests until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, whose end ends this
    _limit_memory()
    for line in sys.stdin:
        request = json.loads(line)
        if hasattr(signal, "setitimer"):  # its default action ends the process
            signal.setitimer(signal.ITIMER_REAL, request["seconds"])
        result = json.dumps(answer(request))
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(result + "\n")
        sys.stdout.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    except (ImportError, ValueError, OSError):  # a system without such limits: the alarm is left
        pass


if __name__ == "__main__":
    main()
