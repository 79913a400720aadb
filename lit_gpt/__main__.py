"""The program `lit_gpt`. Standard library only: `--help` answers before torch could be imported."""

from __future__ import annotations

import gc
import importlib
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import NamedTuple, TextIO

from lit_gpt.errors import UserError, nearest


class Command(NamedTuple):
    """A subcommand: what it does, an example, the function that runs it on `argv`, and one for its help if it has one.

    A function that only prints help need not import what the command does.
    """

    summary: str
    example: str
    target: str
    help: str | None = None


COMMANDS = {
    "prepare": Command(
        "turn text into token shards",
        "lit_gpt prepare my_texts/ --output data/mine --tokenizer bpe:4096",
        "lit_gpt.data.prepare:main",
    ),
    "fit": Command("train a model", "lit_gpt fit --config configs/quickstart.yaml", "lit_gpt.cli.lightning:main"),
    "sweep": Command(
        "train many models that differ in some options",
        "lit_gpt sweep --config base.yaml --set model.config.n_layer=4,6 --seeds 3 --budget 00:05:00",
        "lit_gpt.runs.sweep:main",
        "lit_gpt.runs.sweep_options:print_help",
    ),
    "validate": Command(
        "loss of a checkpoint on validation data", "lit_gpt validate --ckpt_path last", "lit_gpt.cli.lightning:main"
    ),
    "test": Command("loss of a checkpoint on test data", "lit_gpt test --ckpt_path last", "lit_gpt.cli.lightning:main"),
    "predict": Command(
        "continue prompts with a checkpoint",
        'lit_gpt predict --ckpt_path last --start "    def" --num_samples 3',
        "lit_gpt.cli.lightning:main",
        "lit_gpt.cli.predict_options:print_help",
    ),
    "chat": Command(
        "talk with a model that was tuned on conversations",
        "lit_gpt chat --ckpt_path last",
        "lit_gpt.cli.chat:main",
        "lit_gpt.cli.chat_options:print_help",
    ),
    "serve": Command(
        "an OpenAI-compatible server and a web page",
        "lit_gpt serve --ckpt_path last --port 8000",
        "lit_gpt.serve.main:main",
        "lit_gpt.serve.options:print_help",
    ),
    "convert": Command(
        "checkpoints from and to other projects", "lit_gpt convert gpt2 gpt2.ckpt", "lit_gpt.convert.main:main"
    ),
    "info": Command(
        "parameters, shapes, memory, FLOPs", "lit_gpt info --preset gpt2-xl", "lit_gpt.insight.info.main:main"
    ),
    "tokenize": Command(
        "text to pieces and ids, and back",
        'lit_gpt tokenize "你好, world" --tokenizer gpt2',
        "lit_gpt.insight.tokenize:main",
    ),
    "compare": Command(
        "runs beside each other, and which differences are shown",
        "lit_gpt compare lightning_logs/version_0 lightning_logs/version_1 --html comparison.html",
        "lit_gpt.runs.compare:main",
    ),
    "freeze": Command(
        "keep a run's model for good, under a name",
        "lit_gpt freeze lightning_logs/version_0 --name poet",
        "lit_gpt.runs.freeze:main",
    ),
    "remix": Command(
        "how much of what a model writes is verbatim",
        "lit_gpt remix --ckpt_path last --data.path data/mine",
        "lit_gpt.insight.remix.main:main",
    ),
}


def usage() -> str:
    """The text of `lit_gpt --help`."""
    lines = [
        "usage: lit_gpt COMMAND [options]",
        "",
        "Train a GPT from scratch, look inside it and put it to work.",
        "",
        "commands:",
    ]
    for name, command in COMMANDS.items():
        lines += [f"  {name:<10} {command.summary}", f"             {command.example}"]
    lines += ["", "lit_gpt COMMAND --help says more; lit_gpt --version prints the version."]
    return "\n".join(lines)


def run(argv: list[str]) -> int:
    """Run one subcommand; its exit status.

    Raises:
        UserError: for an unknown command or bad input to a known one.
    """
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from importlib.metadata import version

        print(f"lit_gpt {version('lit_gpt')}")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f'unknown command "{argv[0]}": {nearest(argv[0], COMMANDS)}')
    command = COMMANDS[argv[0]]
    if command.help is not None and {"-h", "--help"} & set(argv[1:]):
        _import(command.help)()
        return 0
    is_lightnings = command.target.startswith("lit_gpt.cli.lightning:")
    return _import(command.target)(argv if is_lightnings else argv[1:]) or 0


def _import(target: str) -> Callable[..., int | None]:
    """The function that is written "module:function".

    What a first import brings stays to the end. The search for cycles of dead objects, which would walk through it
    again and again (a quarter of the time that torch and Lightning take), waits until then and leaves it out.
    """
    module, function = target.split(":")
    if module in sys.modules or not gc.isenabled():
        return getattr(importlib.import_module(module), function)
    gc.disable()
    try:
        return getattr(importlib.import_module(module), function)
    finally:
        gc.freeze()
        gc.enable()


def main(argv: list[str] | None = None) -> int:
    """Entry point. Bad input is one line and status 2, a failure one line and status 1; neither is a traceback.

    `LIT_GPT_DEBUG=1` lets the exception through, for those who want to see where it came from.
    """
    hook = threading.excepthook
    if not os.environ.get("LIT_GPT_DEBUG"):
        threading.excepthook = _report_thread
    try:
        return run(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print("lit_gpt: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if isinstance(error, BrokenPipeError) and (left := [s for s in (sys.stdout, sys.stderr) if _reader_left(s)]):
            return _end_without(left)
        if os.environ.get("LIT_GPT_DEBUG"):
            raise
        bad_input = isinstance(error, UserError)
        message = " ".join(str(error).split()) or type(error).__name__
        kind = "error" if bad_input else f"failed: {type(error).__name__}"
        print(f"lit_gpt: {kind}: {message}", file=sys.stderr)
        return 2 if bad_input else 1
    finally:
        threading.excepthook = hook


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """One line for a thread that failed, as TensorBoard's writer on a full disk; the main thread hears of it itself."""
    name = "a thread" if failed.thread is None else failed.thread.name
    message = " ".join(str(failed.exc_value).split())
    print(f"lit_gpt: {name} failed: {failed.exc_type.__name__}: {message}", file=sys.stderr)


def _reader_left(stream: TextIO) -> bool:
    """Whether `stream` is a pipe that nobody will read from any more."""
    poll = select.poll()
    poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def _end_without(left: list[TextIO]) -> int:
    """The exit status after a write to one of these streams has failed.

    Who stops reading results, as `head` does, has what he wanted. Who stops reading messages has not ended the work on
    purpose, and must see that it was cut short.
    """
    for stream in left:  # so that the interpreter's last flush succeeds
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 0 if left == [sys.stdout] else 1


if __name__ == "__main__":
    sys.exit(main())
