"""The chat's input at a terminal: an editor of several lines with a history that stays, by prompt_toolkit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession, print_formatted_text
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from lit_gpt.cli.chat_terminal import ChatTerminal, encodable, printable

_PROMPT = FormattedText([("bold", "> ")])
_CONTINUATION = "  "


class ChatEditor(ChatTerminal):
    """Input at a terminal: Enter sends, Alt-Enter begins a new line."""

    interactive = True

    def __init__(self, commands: Mapping[str, str]) -> None:
        """An editor that completes the names of `commands`, name → what it does."""
        names = [f"/{name}" for name in commands]
        meta = {f"/{name}": text for name, text in commands.items()}
        self._session: PromptSession[str] = PromptSession(
            _PROMPT,
            multiline=True,
            prompt_continuation=_CONTINUATION,
            key_bindings=_key_bindings(),
            history=self._history(),
            completer=WordCompleter(names, meta_dict=meta, sentence=True),
            complete_while_typing=False,
            enable_open_in_editor=False,
        )

    def read(self) -> str | None:
        """The next message or command; None after Ctrl-D, or Ctrl-C twice, at the empty prompt."""
        interrupted = False
        while True:
            try:
                text = encodable(self._session.prompt())
            except EOFError:
                return None
            except KeyboardInterrupt:
                if interrupted:
                    return None
                interrupted = True
                self.say("Ctrl-C once more, or Ctrl-D, ends; /help lists the commands")
                continue
            if text.strip():
                return text

    def say(self, message: str) -> None:
        """A remark, set apart from the answers."""
        print_formatted_text(FormattedText([("italic", printable(message))]), file=sys.stderr, flush=True)

    def refuse(self, message: str) -> None:
        """A line that is refused, or an answer that failed."""
        print_formatted_text(FormattedText([("ansired", f"error: {printable(message)}")]), file=sys.stderr, flush=True)

    def _history(self) -> History:
        try:
            path = history_file()
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # its owner's alone: what was typed is in it
        except (OSError, RuntimeError) as error:
            self.say(f"what you type is remembered until the end only: {error}")
            return InMemoryHistory()
        return StateHistory(path)


class StateHistory(FileHistory):
    """A history in a file; what cannot be read or written any more is no reason to end a chat."""

    def load_history_strings(self) -> Iterable[str]:
        """The entries, the newest first."""
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        """Append an entry, unless it is blank."""
        with suppress(OSError):
            if string.strip():
                super().store_string(string)


def history_file() -> Path:
    """The file with what was typed, in the folder for a user's state of the XDG Base Directory Specification.

    Raises:
        RuntimeError: if nobody knows this user's home.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    folder = Path(named) if os.path.isabs(named) else Path.home() / ".local" / "state"
    return folder / "lit_gpt" / "chat_history"


def _key_bindings() -> KeyBindings:
    """Keys that differ from prompt_toolkit's; not those of a search in the history, which has the focus then."""
    keys = KeyBindings()
    writing = has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=writing)
    def send(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=writing)  # Alt-Enter
    @keys.add("escape", "c-j", filter=writing)  # the same in terminals that send a line feed
    def new_line(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    @keys.add("c-c", filter=writing)
    @keys.add("<sigint>", filter=writing)
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    return keys
