"""The argument parser of `prepare`, `serve`, `convert`, `info`, …: YAML and environment too, one-line errors."""

from __future__ import annotations

import difflib
import json
import re
import sys
import textwrap
from argparse import SUPPRESS, _SubParsersAction
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser

from lit_gpt.errors import UserError

Find = Callable[..., tuple[Any, str | None]]


def found_once(find: Find) -> Find:
    """jsonargparse's search for the action of a key, each result kept until the parser has other actions.

    It looks at every action each time, and a start of `fit` asks three thousand times for some hundred keys. What a
    parser with subcommands finds may lie in one of theirs, and is not kept: it has few actions of its own.
    """

    def find_once(parser: Any, dest: str, exclude: Any = None) -> tuple[Any, str | None]:
        actions = parser._actions
        state = len(actions), actions[-1] if actions else None
        known = vars(parser).get("_found")
        if known is None or known[0] != state:
            keeps = not any(isinstance(action, _SubParsersAction) for action in actions)
            known = parser._found = state, keeps, {}
        _, keeps, found = known
        if (dest, exclude) in found:
            return found[dest, exclude]
        result = find(parser, dest, exclude)
        if keeps:
            found[dest, exclude] = result
        return result

    return find_once


def _find_faster() -> None:
    """Replace the search where jsonargparse has it; a release that has it elsewhere keeps its own."""
    name, modules = "find_action_and_subcommand", []
    for module in ("jsonargparse._subcommands", "jsonargparse._core"):
        with suppress(ImportError):
            modules.append(import_module(module))
    if len(modules) == 2 and all(hasattr(module, name) for module in modules):
        faster = found_once(getattr(modules[0], name))
        for each in modules:
            setattr(each, name, faster)


_find_faster()


class OneLineErrors:
    """Mixin for a jsonargparse parser: bad input is reported in one line that names the nearest right key."""

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """As jsonargparse's, which does not catch what a file that is no text or is nested too deeply makes it raise.

        Raises:
            UserError: for bad input.
        """
        try:
            return super().parse_args(*args, **options)  # type: ignore[misc]
        except UnicodeDecodeError as error:
            path = _not_utf8(args[0] if args else None)
            raise UserError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
        except RecursionError as error:
            raise UserError("a config file is nested too deeply: make it flat") from error

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `UserError`; the program turns it into one line and exit status 2."""
        if isinstance(ex, UserError):
            raise ex
        line = " ".join(str(message).split())
        unknown = re.search(r"(?:unrecognized arguments:|does not accept option|not expected:?) ['\"]?(-*[\w.]+)", line)
        if unknown:
            line = f'unknown option "{unknown[1]}": {self._nearest(unknown[1])}'
        raise UserError(line)

    def _nearest(self, option: str) -> str:
        dashes = "--" if option.startswith("-") else ""
        known = [dashes + key for parser in self._parsers() for key in parser_keys(parser)]
        close = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        return f'did you mean "{close[0]}"?' if close else "--help lists them"

    def _parsers(self) -> list[ArgumentParser]:
        """This parser and its subcommands'."""
        parsers: list[Any] = [self]
        for action in self._actions:  # type: ignore[attr-defined]
            if isinstance(action.choices, dict):
                parsers += action.choices.values()
        return parsers


def _not_utf8(args: Sequence[str] | None) -> str:
    """Which file among the arguments is no text."""
    for word in sys.argv[1:] if args is None else args:
        path = Path(word.partition("=")[2] if word.startswith("-") else word)
        with suppress(OSError):
            try:
                if path.is_file():
                    path.read_text("utf-8")
            except UnicodeDecodeError:
                return str(path)
    return "a config file"


class CommandParser(OneLineErrors, ArgumentParser):
    """The parser of a plain subcommand."""


def parser_keys(parser: ArgumentParser) -> list[str]:
    """Every dotted key of `parser`."""
    return [action.dest for action in parser._actions]


def make_parser(name: str, description: str) -> CommandParser:
    """A parser for `lit_gpt NAME`: `--config FILE` (repeatable), `--print_config`, `LIT_GPT_NAME__KEY`.

    Precedence is jsonargparse's own: default < environment < file < flag.
    """
    parser = CommandParser(
        prog=f"lit_gpt {name}",
        description=description,
        default_env=True,
        env_prefix=f"LIT_GPT_{name.upper()}_",
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options; can be given several times")
    return parser


def options_first(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The words of `argv` with those that belong to no option at the end.

    argparse gives a positional that may be missing nothing but what stands in one row with the one before it: of
    `SOURCE --to hf OUTPUT` the last word would be unknown.
    """
    takes_next = {name for action in parser._actions if action.nargs is None for name in action.option_strings}
    options, positional, words = list[str](), list[str](), iter(argv)
    for word in words:
        if word == "--":
            positional += words
        elif not word.startswith("-") or word == "-":
            positional.append(word)
        else:
            options.append(word)
            options += islice(words, 1 if word in takes_next else 0)
    return [*options, "--", *positional] if positional else options


_TEXT_COLUMN, _WIDTH = 34, 120  # of a help page


def help_page(
    parser: ArgumentParser, examples: Mapping[str, str], groups: Mapping[str, Sequence[str]], end: str = ""
) -> str:
    """The help of a command: examples, then its options in the order in which people need them, with their defaults.

    Args:
        parser: has the options, with their help.
        examples: what each does → the command.
        groups: heading → keys of `parser`; a key that is in none is not shown.
        end: more lines.
    """
    lines = [f"usage: {parser.prog} [options]", "", parser.description or "", "", "examples:"]
    for text, command in examples.items():
        lines += [f"  {command}", f"      {text}"]
    actions = {action.dest: action for action in parser._actions}
    for heading, keys in groups.items():
        lines += ["", f"{heading}:"]
        for key in keys:
            lines += _option_lines(actions[key])
    return "\n".join([*lines, *(["", end] if end else [])])


def _option_lines(action: Any) -> Iterator[str]:
    flag = f"  --{action.dest}"
    if isinstance(action.default, (str, int, float)) and action.default is not False and action.default != SUPPRESS:
        flag += f" {json.dumps(action.default) if action.default == '' else action.default}"
    choices = next((kind for kind in _parts(getattr(action, "_typehint", None)) if get_origin(kind) is Literal), None)
    text = " ".join((action.help or "").split())
    if choices is not None:
        text += f" ({', '.join(map(str, get_args(choices)))})"
    rows = textwrap.wrap(text, _WIDTH - _TEXT_COLUMN, break_on_hyphens=False) or [""]
    if len(flag) >= _TEXT_COLUMN:
        yield flag
        flag = ""
    yield f"{flag:<{_TEXT_COLUMN}}{rows[0]}".rstrip()
    yield from (" " * _TEXT_COLUMN + row for row in rows[1:])


def _parts(hint: Any) -> tuple[Any, ...]:
    """A type, or the parts of a union of types."""
    return (hint,) if get_origin(hint) is Literal else (hint, *get_args(hint))
