"""The options of `chat` and its help. Imports no torch: `chat --help` answers at once."""

from __future__ import annotations

import dataclasses

from jsonargparse import Namespace

from lit_gpt.console.messages import note
from lit_gpt.console.options import CommandParser, help_page, make_parser
from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig

_DRAWING = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "stop")
_PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
_GROUPS = {
    "the model": ("ckpt_path", "init_from", "system", "precision", "device", "n_head"),
    "how answers are drawn": _DRAWING,
    "what is written less often": _PENALTIES,
    "the options themselves": ("config", "print_config", "help"),
}
_EXAMPLES = {
    "with the newest run, which was tuned on conversations": "lit_gpt chat --ckpt_path last",
    "with a chat model of the hub, cooler and shorter": (
        'lit_gpt chat --init_from Qwen/Qwen2.5-0.5B-Instruct --temperature 0.7 --system "Answer in one sentence."'
    ),
    "from a file, a message on each line": "lit_gpt chat --ckpt_path last < questions.txt > answers.txt",
}
_END = """At the prompt: Enter sends, Alt-Enter begins a new line, pasted text keeps its lines, Up and Ctrl-R find what
you typed before, also in earlier chats ($XDG_STATE_HOME/lit_gpt/chat_history keeps it, by default in ~/.local/state).
Ctrl-C stops the answer and keeps what was written of it; at the empty prompt Ctrl-D, or Ctrl-C twice, ends the program.
/help lists the commands: /system /temperature /seed /retry /undo /clear /trace /save /quit.
When the context is full, the oldest messages are left out, with a remark; the system message stays.
Where stdin or stdout is no terminal, a line is a message or a command; answers go to stdout and all else to stderr, and
the exit status is 2 if a line was refused, 1 if the model failed.

The model must have a chat template: lit_gpt fit --config configs/chat.yaml gives it one and teaches it to answer.
Every option is also a key of a YAML file for --config or, as LIT_GPT_CHAT__TEMPERATURE, of the environment."""

ALL_THAT_FITS = 2**31 - 1
"""As `max_new_tokens`: the context ends the answer."""


def parse(argv: list[str]) -> tuple[Namespace, GenerationConfig]:
    """The options of `lit_gpt chat`, and its settings of generation. What has no effect is said on stderr.

    Raises:
        UserError: for an unknown option or value, or options that do not go together.
    """
    options: Namespace = _parser().parse_args(argv)
    if (options.ckpt_path is None) == (options.init_from is None):
        raise UserError("chat needs a model: give either --ckpt_path X or --init_from SOURCE")
    if options.n_head is not None and options.init_from is None:
        raise UserError(f"--n_head {options.n_head} is for --init_from: leave it out, or name the source there")
    if options.max_new_tokens is not None and options.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={options.max_new_tokens} leaves no answer: choose at least 1, or leave it out")
    values = {name: options[name] for name in (*_DRAWING, *_PENALTIES) if options[name] is not None}
    settings = GenerationConfig.from_dict({"max_new_tokens": ALL_THAT_FITS, **values})
    for remark in settings.check():
        note(remark)
    return options, settings


def print_help() -> None:
    """Print the help of `chat`."""
    print(help_page(_parser(), _EXAMPLES, _GROUPS, _END))


def _parser() -> CommandParser:
    parser = make_parser("chat", "Talk with a model that was tuned on conversations, in the terminal.")
    add = parser.add_argument
    add("--ckpt_path", type=str | None, help="a checkpoint, or `last` or `best` of the newest run")
    add("--init_from", type=str | None, help="instead, what `lit_gpt convert` reads: a Hugging Face folder or id, …")
    add("--n_head", type=int | None, help='heads of --init_from, which a .pth of "LLMs from scratch" does not say')
    add("--system", type=str | None, help="a system message: what the model is told before the conversation")
    add("--precision", type=str, default="auto", help="of the weights: auto, fp32, bf16, int8 or int4")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    text = "the most tokens of an answer; by default it may fill the context"
    add("--max_new_tokens", type=int | None, help=text)
    names = {item.name for item in dataclasses.fields(GenerationConfig)}
    parser.add_class_arguments(GenerationConfig, skip=names - {*_DRAWING, *_PENALTIES} | {"max_new_tokens"})
    return parser
