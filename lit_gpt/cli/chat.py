"""The program `lit_gpt chat`: a conversation with a model, in a terminal or through pipes."""

from __future__ import annotations

import sys
from contextlib import closing

from jsonargparse import Namespace

from lit_gpt.api import load_for, resolve_device
from lit_gpt.checkpoint.format import resolve_ckpt_path
from lit_gpt.cli.chat_commands import COMMANDS, QUIT, ChatContext, run_command, split_command
from lit_gpt.cli.chat_options import parse
from lit_gpt.cli.chat_session import ChatSession, check_system
from lit_gpt.cli.chat_terminal import ChatTerminal, show_answer
from lit_gpt.console.messages import note
from lit_gpt.convert.recognise import open_source
from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.inference.prepare import inference_precision
from lit_gpt.tokenizer.chat_template import ChatTemplate

_N_HEAD_OPTION = "lit_gpt chat --n_head N"


def main(argv: list[str]) -> int:
    """Run `lit_gpt chat` until its input ends.

    Returns:
        0; where no person is at the keyboard 2 if a line was refused, and 1 if an answer failed.

    Raises:
        UserError: for bad options, a checkpoint that cannot be loaded, or one that cannot chat.
    """
    options, settings = parse(argv)
    inference_precision(options.precision, resolve_device(options.device).type)  # refuses before it is loaded
    source = str(resolve_ckpt_path(options.ckpt_path)) if options.ckpt_path else options.init_from
    with closing(open_template(source, options)) as template:
        session = open_session(source, options, template, settings)
        terminal = open_terminal()
        if terminal.interactive:
            terminal.say(f"context: {session.context} tokens. /help lists the commands, Ctrl-D ends")
        return converse(ChatContext(session, terminal, set()))


def open_template(source: str, options: Namespace) -> ChatTemplate:
    """The chat template of a checkpoint, of which no weights are read yet.

    Raises:
        UserError: if there is no such checkpoint, it has no template, or that refuses the system message.
    """
    opened = open_source(source, None, options.n_head, _N_HEAD_OPTION)
    if opened.tokenizer is None:
        raise UserError(f"{source} was trained on bare ids and has no tokenizer: chat needs one to speak text")
    if opened.tokenizer.chat_template is None:
        raise UserError(
            f"{source} has no chat template, it only continues text: use lit_gpt predict, or teach it to answer with "
            f"lit_gpt fit --config configs/chat.yaml --init_from {source} --data.source conversations.jsonl"
        )
    template = ChatTemplate(opened.tokenizer)
    try:
        if options.system:
            check_system(template, options.system, opened.config.block_size)
    except BaseException:
        template.close()
        raise
    return template


def open_session(source: str, options: Namespace, template: ChatTemplate, settings: GenerationConfig) -> ChatSession:
    """Load the model; a conversation with it.

    Raises:
        UserError: if it cannot be loaded, or settings do not fit it.
    """
    note(f"loading {source}")
    gpt = load_for(source, options.precision, options.device, options.n_head, _N_HEAD_OPTION)
    return ChatSession(gpt.engine(max_slots=1), template, settings, options.system or None)


def open_terminal() -> ChatTerminal:
    """An editor if both ends are a terminal, else lines."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return ChatTerminal()
    from lit_gpt.cli.chat_editor import ChatEditor

    return ChatEditor({name: command.summary for name, command in COMMANDS.items()})


def converse(chat: ChatContext) -> int:
    """Run lines until there are no more; the exit status, as `main` has it."""
    refused = failed = False
    while True:
        try:
            line = chat.terminal.read()
        except UserError as error:
            refused = True
            chat.terminal.refuse(str(error))
            continue
        if line is None:
            break
        try:
            if not _run_line(chat, line):
                break
        except UserError as error:
            refused = True
            chat.terminal.refuse(str(error))
        except RuntimeError as error:  # of the model; the conversation is what it was
            failed = True
            chat.terminal.refuse(" ".join(str(error).split()) or type(error).__name__)
        except KeyboardInterrupt:
            if not chat.terminal.interactive:
                raise
    if chat.terminal.interactive:
        return 0
    return 1 if failed else 2 if refused else 0


def _run_line(chat: ChatContext, line: str) -> bool:
    """Run a command or answer a message; whether the conversation goes on."""
    command = split_command(line)
    if command is None:
        show_answer(chat.session, chat.terminal, lambda: chat.session.ask(line))
    elif command == (QUIT, ""):
        return False
    else:
        run_command(chat, *command)
    return True
