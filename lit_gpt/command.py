"""What the plain subcommands (`prepare`, `serve`, `convert`, `info`, …) share: one parser, one manner."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from lit_gpt.errors import UserError


class CommandParser(ArgumentParser):
    """A jsonargparse parser whose errors are one line on stderr and exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise `UserError`; the program turns it into one line and exit status 2."""
        raise UserError(" ".join(str(message).split()))


def make_parser(name: str, description: str) -> Any:
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


def note(message: str) -> None:
    """Progress and remarks go to stderr; stdout holds results only."""
    print(message, file=sys.stderr, flush=True)
