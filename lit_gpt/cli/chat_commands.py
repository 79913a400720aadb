"""The commands of a chat: lines that begin with a slash and a word."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lit_gpt.cli.chat_session import ChatSession
from lit_gpt.cli.chat_terminal import ChatTerminal, held_interrupts, show_answer
from lit_gpt.data.conversations import SUFFIXES
from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.files.atomic import atomic_write

_COMMAND = re.compile(r"/([A-Za-z]\w*)(?:\s+(.*))?", re.DOTALL)
NO_SYSTEM = '""'
"""What stands for no system message."""

QUIT = "quit"


class ChatContext(NamedTuple):
    """What a command works on.

    Attributes:
        session: the conversation.
        terminal: shows what it says.
        saved: the files that this program has written, which it may write again.
    """

    session: ChatSession
    terminal: ChatTerminal
    saved: set[Path]


class ChatCommand(NamedTuple):
    """A command: what may stand after its name, what it does, and the function that does it with that.

    One without arguments has `argument` "".
    """

    argument: str
    summary: str
    run: Callable[[ChatContext, str], None]


def split_command(line: str) -> tuple[str, str] | None:
    """Name and argument of a command, None for a message.

    A path is a message, and so is what begins with a space.

    >>> split_command("/seed 3"), split_command("/etc/hosts?"), split_command(" /seed is a command")
    (('seed', '3'), None, None)
    """
    found = _COMMAND.fullmatch(line)
    return None if found is None else (found[1], (found[2] or "").strip())


def run_command(chat: ChatContext, name: str, argument: str) -> None:
    """Run one command other than `QUIT`.

    Raises:
        UserError: if it is unknown, its argument is wrong, or it cannot be done.
    """
    if name not in COMMANDS:
        known = nearest(f"/{name}", [f"/{each}" for each in COMMANDS])
        raise UserError(f'unknown command "/{name}": {known} (a space in front makes it a message)')
    command = COMMANDS[name]
    if argument and not command.argument:
        raise UserError(f"/{name} stands alone: leave {brief(argument)} out")
    command.run(chat, argument)


def _help(chat: ChatContext, argument: str) -> None:
    lines = [f"/{name} {command.argument}".ljust(20) + command.summary for name, command in COMMANDS.items()]
    chat.terminal.say("\n".join([*lines, "", KEYS]))


def _system(chat: ChatContext, argument: str) -> None:
    session = chat.session
    if argument:
        session.set_system(None if argument == NO_SYSTEM else argument)
    if session.system is None:
        chat.terminal.say("no system message")
    else:
        chat.terminal.say(f"system message: {session.system}")


def _seed(chat: ChatContext, argument: str) -> None:
    session = chat.session
    if argument:
        try:
            seed = None if argument == "none" else int(argument)
        except ValueError:
            raise UserError(f"seed={brief(argument)} is no whole number: write one, or none") from None
        _change(chat, seed=seed)
    fresh = session.settings.seed is None
    chat.terminal.say("seed: none, a fresh one for each answer" if fresh else f"seed: {session.settings.seed}")


def _temperature(chat: ChatContext, argument: str) -> None:
    if argument:
        try:
            temperature = float(argument)
        except ValueError:
            raise UserError(f"temperature={brief(argument)} is no number: write one, such as 0.8") from None
        _change(chat, temperature=temperature)
    chat.terminal.say(f"temperature: {chat.session.settings.temperature:g}")


def _change(chat: ChatContext, **settings: float | None) -> None:
    for remark in chat.session.change(**settings):
        chat.terminal.say(remark)


def _retry(chat: ChatContext, argument: str) -> None:
    show_answer(chat.session, chat.terminal, chat.session.retry)


def _undo(chat: ChatContext, argument: str) -> None:
    chat.terminal.say(f"taken back: {brief(chat.session.undo())}")


def _clear(chat: ChatContext, argument: str) -> None:
    chat.session.clear()
    chat.terminal.say("a new conversation")


def _trace(chat: ChatContext, argument: str) -> None:
    from lit_gpt.insight.trace_table import steps_table

    with held_interrupts(chat.terminal.interactive):
        steps = chat.session.trace()
    chat.terminal.print(steps_table(steps, "the last answer"))


def _save(chat: ChatContext, argument: str) -> None:
    if not argument:
        raise UserError("/save needs the name of a file, such as /save chat.jsonl")
    if not chat.session.exchanges:
        raise UserError("there is nothing to save: the conversation has not begun")
    try:
        path = Path(argument).expanduser()
        if path.suffix not in SUFFIXES:
            raise UserError(f"{brief(argument)}: let the name end in .jsonl, by which fit knows conversations")
        if path.resolve() not in chat.saved and path.exists():
            raise UserError(f"{path} exists already: name a new file")
        with atomic_write(path, "w") as file:
            turns = [{"role": each.role, "content": each.content} for each in chat.session.messages()]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    except (OSError, RuntimeError, ValueError) as error:  # also a home that is unknown, and a name with a NUL
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{brief(argument)} cannot be written ({reason}): name another file") from error
    chat.saved.add(path.resolve())
    chat.terminal.say(f"{len(turns)} messages in {path}")


def _quit(chat: ChatContext, argument: str) -> None:
    raise AssertionError("the loop that reads the lines ends")


KEYS = (
    "Enter sends, Alt-Enter begins a new line, Up finds what you typed before;\n"
    "Ctrl-C stops an answer; at the empty prompt Ctrl-D, or Ctrl-C twice, ends the program"
)

COMMANDS = {
    "system": ChatCommand("TEXT", f"tell the model TEXT before the conversation; {NO_SYSTEM} for nothing", _system),
    "temperature": ChatCommand("X", "divide the logits by X; 0 takes the likeliest token", _temperature),
    "seed": ChatCommand("N", "draw each answer with seed N; none for a fresh one each time", _seed),
    "retry": ChatCommand("", "answer the last message again, with the next seed", _retry),
    "undo": ChatCommand("", "take the last message and its answer back", _undo),
    "clear": ChatCommand("", "begin a new conversation", _clear),
    "trace": ChatCommand("", "show how each token of the last answer was chosen", _trace),
    "save": ChatCommand("FILE", "write the conversation as a line of JSON that fit --data.format chat reads", _save),
    "help": ChatCommand("", "show this", _help),
    QUIT: ChatCommand("", "end", _quit),
}
