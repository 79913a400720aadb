"""A program of its own that renders chat templates: requests on stdin, answers on stdout, one JSON object a line.

A template is a program that came with a checkpoint. Jinja's sandbox keeps it from files and objects, but not from
loops that never end or strings that fill the memory, and no thread can be stopped. So it runs in this process, which
the operating system ends: after `seconds` by an alarm, whatever is being computed, and beyond `MAX_BYTES` of memory.

It is run by its path and imports nothing of lit_gpt, so that it starts fast. The environment is that of transformers
(`transformers/utils/chat_template_utils.py`): the same whitespace, loop controls, filters and functions, and the tag
`{% generation %}` around what the assistant says.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_BYTES = 1 << 30
"""Address space of this process."""

MAX_CHARACTERS = 16 << 20
"""Of a rendered conversation; a request's body is smaller."""


class GenerationTag(Extension):
    """`{% generation %}` … `{% endgeneration %}`: what is between them, between two marks.

    Marks, and not offsets noted while it renders, as what is in a macro or a `set` block stands somewhere else later.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own type)
    marks = ("", "")

    def parse(self, parser: Parser) -> nodes.Node:
        """The node of the tag and what it encloses."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Macro) -> str:
        begin, end = GenerationTag.marks
        return f"{begin}{caller()}{end}"


@lru_cache(maxsize=4)
def compile_template(source: str) -> Any:
    """The template of that source."""
    extensions = [GenerationTag, LoopControlExtension]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: time.strftime(form)
    return environment.from_string(source)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is: Jinja's own filter writes characters of HTML in another way."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """`texts`, or `error` with what the template says; an error of another kind by its type only."""
    texts = []
    try:
        template = compile_template(request["template"])
        GenerationTag.marks = ("", "")
        for variables in request["renderings"]:
            texts.append(template.render(**variables))
            GenerationTag.marks = tuple(request["marks"])
    except Exception as error:  # a template can fail in any way
        return {"error": str(error)[:1000] if isinstance(error, TemplateError) else type(error).__name__}
    longest = max(map(len, texts), default=0)
    if longest > MAX_CHARACTERS:
        return {"error": f"it makes {longest} characters of them"}
    return {"texts": texts}


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
