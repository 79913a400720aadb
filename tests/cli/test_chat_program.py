"""`lit_gpt chat` as a user runs it: in a pseudo-terminal, through pipes, and with what it refuses."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from chat_models import NEVER, chat_gpt, chatml, chatml_tokenizer, save_chat_model
from environment import FIXTURES, ROOT
from fork_server import Child, ForkServer
from models import tiny_gpt

from lit_gpt.__main__ import main
from lit_gpt.api import load
from lit_gpt.checkpoint.format import save_model
from lit_gpt.cli.chat_commands import split_command

pexpect = pytest.importorskip("pexpect", reason="pexpect is not installed")
fdpexpect = pytest.importorskip("pexpect.fdpexpect")

READY = b"\x1b[?2004h"
"""What prompt_toolkit writes when it begins to read a message."""
SETTINGS = ["--seed", "3", "--max_new_tokens", "12", "--precision", "fp32"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers in some ten characters."""
    return save_chat_model(tmp_path_factory.mktemp("chat") / "chat.ckpt", seed=1)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not end its answers; one takes many seconds."""
    path = tmp_path_factory.mktemp("endless") / "endless.ckpt"
    return save_chat_model(path, seed=1, end=NEVER, block_size=60_000, position="rope")


Answer = Callable[..., str]


@pytest.fixture(scope="module")
def answer(checkpoint: Path) -> Answer:
    """`answer(("user", "hello"), …)`: that of `checkpoint`, by a completion of what is put together by hand."""
    gpt = load(str(checkpoint), precision="fp32")

    def complete(*turns: tuple[str, str], **settings: Any) -> str:
        values = {"seed": 3, "max_new_tokens": 12, "stop_token_ids": [258], "overflow": "stop", **settings}
        text = gpt.generate(chatml(*turns), **values)
        assert isinstance(text, str) and text.strip()
        return text

    return complete


# In a terminal --------------------------------------------------------------------------------------------------------


class Terminal:
    """The program in a pseudo-terminal of 40 rows and 200 columns, and a person who types."""

    def __init__(self, screen: Any, child: Child) -> None:
        self.screen = screen
        self.child = child
        self.shown = screen.logfile_read = io.BytesIO()

    def type(self, text: str) -> None:
        """Send keys."""
        self.screen.send(text)

    def expect(self, *texts: str | bytes) -> None:
        """Wait for each of them, in this order."""
        for text in texts:
            self.screen.expect_exact(text if isinstance(text, bytes) else text.encode())

    def end(self) -> int | None:
        """Wait for the program's end; its exit status."""
        self.screen.expect(pexpect.EOF)
        return self.child.wait(30)


@pytest.fixture
def terminal(fork_server: ForkServer, tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """`terminal(checkpoint, …)`: the chat, once it waits for a message."""
    with ExitStack() as stack:

        def start(checkpoint: Path, *options: str, shows: str = "/help lists", **environment: str) -> Terminal:
            return stack.enter_context(_on_terminal(fork_server, tmp_path, checkpoint, options, shows, environment))

        yield start


@contextmanager
def _on_terminal(
    server: ForkServer, cwd: Path, checkpoint: Path, options: Any, shows: str, environment: dict[str, str]
) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 200, 0, 0))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    env |= {"XDG_STATE_HOME": str(cwd / "state"), **environment}
    script = ROOT / "tests/on_terminal.py"
    words = ["lit_gpt", "chat", "--ckpt_path", checkpoint, *SETTINGS, *options]
    child = server.start(script, os.ttyname(theirs), *words, cwd=cwd, env=env)
    screen = fdpexpect.fdspawn(ours, timeout=60)
    opened = Terminal(screen, child)
    try:
        opened.expect(shows, READY)
        os.close(theirs)  # not before the program has it open: this would be the end
        yield opened
    finally:
        child.kill()
        child.finish(10)
        screen.close()


Open = Callable[..., Terminal]


@pytest.mark.slow
def test_a_conversation_in_a_terminal(checkpoint: Path, terminal: Open, answer: Answer, tmp_path: Path) -> None:
    chat = terminal(checkpoint, "--system", "Be brief.")
    first = answer(("system", "Be brief."), ("user", "hello"))
    chat.type("hello\r")
    chat.expect(first, READY)
    turns = [("system", "Be brief."), ("user", "hello"), ("assistant", first), ("user", "one\ntwo")]
    chat.type("one\x1b\rtwo\r")  # Alt-Enter
    chat.expect(answer(*turns), READY)
    chat.type("/undo\r")
    chat.expect("taken back: 'one\\ntwo'", READY)
    chat.type("\x1b[200~one\ntwo\x1b[201~")  # pasted
    chat.type("\r")
    chat.expect(answer(*turns), READY)
    chat.type("/retry\r")
    again = answer(*turns, seed=4)
    chat.expect(again, READY)
    chat.type("/trace\r")
    chat.expect("the last answer", "alternatives", READY)
    chat.type("/save talk.jsonl\r")
    chat.expect("5 messages in talk.jsonl", READY)
    chat.type("\x04")  # Ctrl-D
    assert chat.end() == 0
    messages = json.loads((tmp_path / "talk.jsonl").read_text("utf-8"))["messages"]
    assert [(each["role"], each["content"]) for each in messages] == [*turns, ("assistant", again)]


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program(endless: Path, terminal: Open) -> None:
    chat = terminal(endless, "--max_new_tokens", "50000", "--temperature", "0")
    gpt = load(str(endless), precision="fp32")
    chat.type("hello\r")
    chat.expect(gpt.generate(chatml(("user", "hello")), temperature=0, max_new_tokens=10))
    chat.type("\x03")
    chat.expect("stopped: /retry answers again", READY)
    chat.type("/undo\r")
    chat.expect("taken back: 'hello'", READY)  # what was written of it was kept
    chat.type("not sent\x03\x03")  # the first one clears the line
    chat.expect("Ctrl-C once more, or Ctrl-D, ends", READY)
    chat.type("/seed\r")
    chat.expect("seed: 3", READY)
    chat.type("\x03")
    chat.expect("Ctrl-C once more", READY)  # a command was between
    chat.type("\x03")
    assert chat.end() == 0


@pytest.mark.slow
def test_wrong_commands_in_a_terminal_are_one_line_each(checkpoint: Path, terminal: Open) -> None:
    chat = terminal(checkpoint)
    for line, message in [
        ("/sed 3", 'error: unknown command "/sed": did you mean "/seed"?'),
        ("/temperature hot", "error: temperature='hot' is no number: write one, such as 0.8"),
        ("/save", "error: /save needs the name of a file"),
        ("x" * 250, "error: with this message the prompt has"),
    ]:
        chat.type(f"{line}\r")
        chat.expect(message, READY)
    chat.type("/quit\r")
    assert chat.end() == 0
    assert b"Traceback" not in chat.shown.getvalue()


@pytest.mark.slow
def test_what_was_typed_is_found_again_in_the_next_chat(checkpoint: Path, terminal: Open, tmp_path: Path) -> None:
    chat = terminal(checkpoint)
    chat.type("/seed 41\r")
    chat.expect("seed: 41", READY)
    chat.type("\x04")
    assert chat.end() == 0
    kept = tmp_path / "state/lit_gpt/chat_history"
    assert "+/seed 41" in kept.read_text() and kept.stat().st_mode & 0o077 == 0
    chat = terminal(checkpoint)
    for _ in range(30):  # the file is read while the editor waits already
        chat.type("\x1b[A")  # up
        if chat.screen.expect_exact([b"/seed 41", pexpect.TIMEOUT], timeout=1) == 0:
            break
    chat.type("\r")
    chat.expect("seed: 41", READY)


@pytest.mark.slow
def test_without_a_folder_for_its_state_the_chat_remembers_until_its_end(checkpoint: Path, terminal: Open) -> None:
    chat = terminal(checkpoint, shows="remembered until the end only", XDG_STATE_HOME="/proc/none")
    chat.type("/quit\r")
    assert chat.end() == 0


@pytest.mark.slow
def test_what_a_model_writes_gives_a_terminal_no_orders(tmp_path: Path, terminal: Open) -> None:
    gpt = chat_gpt(seed=1)
    gpt.lm_head.bias.data[32:127] = NEVER
    gpt.lm_head.bias.data[0x1B] = 10.0
    save_model(tmp_path / "orders.ckpt", gpt, chatml_tokenizer())
    chat = terminal(tmp_path / "orders.ckpt")
    chat.type("hello\r")
    chat.expect("\\x1b\\x1b\\x1b", READY)


# Through pipes --------------------------------------------------------------------------------------------------------


Piped = Callable[..., int]


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, checkpoint: Path) -> Piped:
    """`piped(lines)`: the exit status of a chat that reads them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(lines: bytes, *options: str) -> int:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
        return main(["chat", *(options or ["--ckpt_path", str(checkpoint)]), *SETTINGS])

    return run


@pytest.mark.slow
def test_a_line_is_a_message_and_the_answers_are_all_of_stdout(
    piped: Piped, answer: Answer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped("hello\r\n\n/seed 4\n你好".encode()) == 0
    first = answer(("user", "hello"))
    second = answer(("user", "hello"), ("assistant", first), ("user", "你好"), seed=4)
    printed = capsys.readouterr()
    assert printed.out == f"{first}\n{second}\n"
    assert "seed: 4" in printed.err and "\x1b" not in printed.err
    assert not (tmp_path / "state").exists()


def test_through_pipes_all_lines_run_and_the_status_says_that_one_was_refused(
    piped: Piped, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = b"/sed 3\n/save\n\xff\xfe\n/etc/hosts?\n/quit\nnever read\n"
    assert piped(lines) == 2
    printed = capsys.readouterr()
    assert printed.out == answer(("user", "/etc/hosts?")) + "\n"  # a path is no command
    errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert errors[0] == 'error: unknown command "/sed": did you mean "/seed"? (a space in front makes it a message)'
    assert errors[2] == "error: line 3 of the input is not UTF-8: save it as UTF-8"


@pytest.mark.slow
def test_a_trace_through_a_pipe_has_no_escape_codes(
    piped: Piped, answer: Answer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert piped(b"hello\n/trace\n") == 0
    out = capsys.readouterr().out
    assert out.startswith(answer(("user", "hello")) + "\nthe last answer") and "\x1b" not in out


@pytest.mark.slow
def test_an_exported_model_chats_alike(piped: Piped, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = tmp_path / "plain.ckpt", tmp_path / "hf"
    save_model(ours, tiny_gpt(std=None, vocab_size=259, block_size=64, init_std=0.3).float(), chatml_tokenizer())
    assert main(["convert", str(ours), str(theirs), "--to", "hf"]) == 0
    capsys.readouterr()
    for source in (["--ckpt_path", str(ours)], ["--init_from", str(theirs)]):
        assert piped("你好\n/system S\nand?\n".encode(), *source) == 0
    out = capsys.readouterr().out
    half = len(out) // 2
    assert out[:half] == out[half:] and len(out.strip()) > 10


@pytest.mark.slow
def test_a_real_pipe_and_neither_lightning_nor_an_editor_are_loaded(
    checkpoint: Path, answer: Answer, tmp_path: Path
) -> None:
    script = (
        "import sys\nfrom lit_gpt.__main__ import main\nstatus = main(sys.argv[1:])\n"
        "heavy = {'lightning', 'prompt_toolkit', 'transformers'} & set(sys.modules)\nassert not heavy, heavy\n"
        "sys.exit(status)"
    )
    command = [sys.executable, "-c", script, "chat", "--ckpt_path", str(checkpoint), *SETTINGS]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, cwd=tmp_path, env=_environment())
    assert (done.returncode, done.stdout) == (0, answer(("user", "hello")) + "\n"), done.stderr


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def test_lines_that_are_commands() -> None:
    assert split_command("/system You are\nbrief. ") == ("system", "You are\nbrief.")
    for text in ("hello /seed", " /seed", "/", "// a comment", "/tmp/x", "/seed/3", "¿/seed", "/3"):
        assert split_command(text) is None


# Refused before anything is loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "chat needs a model: give either --ckpt_path X or --init_from SOURCE"),
        (["--ckpt_path", "CHAT", "--init_from", "CHAT"], "chat needs a model"),
        (["--ckpt_path", "absent.ckpt"], "absent.ckpt does not exist"),
        (["--ckpt_path", "last"], "no run under"),
        (["--ckpt_path", "CHAT", "--n_head", "2"], "--n_head 2 is for --init_from"),
        (["--ckpt_path", "CHAT", "--temperature", "-1"], "temperature=-1.0 is outside"),
        (["--ckpt_path", "CHAT", "--max_new_tokens", "0"], "max_new_tokens=0 leaves no answer"),
        (["--ckpt_path", "CHAT", "--sytem", "x"], 'unknown option "--sytem": did you mean "--system"?'),
        (["--ckpt_path", "CHAT", "--precision", "fp7"], 'unknown precision "fp7"'),
        (["--ckpt_path", "CHAT", "--device", "tpu"], "device='tpu' cannot be used here"),
        (["--ckpt_path", "CHAT", "--system", "x" * 300], "the system message makes a prompt of"),
        (["--ckpt_path", "PLAIN"], "has no chat template, it only continues text: use lit_gpt predict, or teach it"),
    ],
)
def test_bad_options_are_one_line_and_status_2(
    options: list[str],
    message: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"CHAT": str(checkpoint), "PLAIN": str(FIXTURES / "modern.ckpt")}
    assert main(["chat", *(names.get(word, word) for word in options)]) == 2
    printed = capsys.readouterr()
    (line,) = printed.err.strip().splitlines()
    assert printed.out == "" and message in line and line.startswith("lit_gpt: error: ")
    if "PLAIN" in options:
        assert "configs/chat.yaml" in line


def test_every_option_of_chat_is_in_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    from lit_gpt.cli.chat_options import _parser
    from lit_gpt.console.options import parser_keys

    assert main(["chat", "--help"]) == 0
    page = capsys.readouterr().out
    assert [key for key in parser_keys(_parser()) if f"--{key}" not in page] == []
