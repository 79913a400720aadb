"""The chat's input and output: lines from a file or a pipe, or a terminal with an editor."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, BinaryIO

from lit_gpt.cli.chat_session import ChatSession
from lit_gpt.console.messages import note
from lit_gpt.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class ChatTerminal:
    """Input that is no terminal: a line is a message or a command. Answers go to stdout, all else to stderr.

    Attributes:
        interactive: whether a person is at the keyboard: Ctrl-C then stops the answer and not the program.
    """

    interactive = False

    def __init__(self, stdin: BinaryIO | None = None) -> None:
        """Input from `stdin`, None for this process's."""
        self._stdin = sys.stdin.buffer if stdin is None else stdin
        self._line = 0

    def read(self) -> str | None:
        """The next line that is not empty; None at the end.

        Raises:
            UserError: for a line that is no text; the next call reads on.
        """
        for data in iter(self._stdin.readline, b""):
            self._line += 1
            try:
                text = data.decode("utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise UserError(f"line {self._line} of the input is not UTF-8: save it as UTF-8") from None
            if text.strip():
                return text
        return None

    def write(self, piece: str) -> None:
        """A piece of an answer."""
        if piece:
            sys.stdout.write(printable(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()

    def end_answer(self) -> None:
        """The answer is complete."""
        self.write("\n")

    def say(self, message: str) -> None:
        """A remark."""
        note(printable(message) if sys.stderr.isatty() else message)

    def refuse(self, message: str) -> None:
        """A line that is refused, or an answer that failed."""
        self.say(f"error: {message}")

    def print(self, table: RenderableType) -> None:
        """A table."""
        from rich.console import Console

        Console(highlight=False).print(table)


def printable(text: str) -> str:
    r"""The text without the characters that are orders to a terminal: a model may write any.

    >>> printable("a\x1b[2Jb\tc")
    'a\\x1b[2Jb\tc'
    """
    return _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)


def encodable(text: str) -> str:
    """The text with U+FFFD for bytes that were none, which Python hands on as lone surrogates."""
    return _SURROGATE.sub("\ufffd", text)


@contextmanager
def held_interrupts(hold: bool) -> Iterator[Callable[[], bool]]:
    """While it lasts, Ctrl-C raises nothing if `hold`; the function that it gives says whether it was pressed."""
    if not hold:
        yield lambda: False
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def show_answer(session: ChatSession, terminal: ChatTerminal, start: Callable[[], Generator[str, None, None]]) -> None:
    """Show an answer as it is generated, and what is to be said about it. Ctrl-C at a terminal stops it.

    Args:
        session: the conversation.
        terminal: where to.
        start: of `session`, starts the answer.

    Raises:
        UserError, RuntimeError: as `start` and what it gives.
    """
    left_out, before = session.left_out, session.exchanges
    with held_interrupts(terminal.interactive) as interrupted:
        pieces = start()
        if session.left_out > left_out:
            terminal.say(
                f"the context of {session.context} tokens is full: the oldest {2 * session.left_out} messages are left "
                "out (/save has them)"
            )
        with closing(pieces):
            try:
                for piece in pieces:
                    terminal.write(piece)
                    if interrupted():
                        break
            finally:
                terminal.end_answer()
    if session.exchanges is before:
        terminal.say("stopped before the first token: the conversation is what it was")
    elif (remark := _remark(session)) is not None:
        terminal.say(remark)


def _remark(session: ChatSession) -> str | None:
    """What a reader of the last answer cannot see."""
    last = session.exchanges[-1]
    completion = last.completion
    if completion.finish_reason == "cancelled":
        return "stopped: /retry answers again, /undo takes the message back"
    if completion.finish_reason == "length":
        full = len(last.prompt_ids) + len(completion.tokens) >= session.context
        reason = (
            f"the context of {session.context} tokens is full"
            if full
            else (f"max_new_tokens={last.generation_config.max_new_tokens}")
        )
        return f"cut off: {reason}"
    return None if completion.text.strip() else "the answer is empty"
