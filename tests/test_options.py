"""The parser of the plain subcommands."""

from __future__ import annotations

import pytest

from lit_gpt.console.options import make_parser, options_first
from lit_gpt.errors import UserError


@pytest.mark.parametrize(
    ("argv", "source", "output"),
    [
        (["a", "b"], "a", "b"),
        (["a"], "a", None),
        (["a", "--to", "hf"], "a", None),
        (["a", "--to", "hf", "b"], "a", "b"),  # argparse alone: unknown option "b"
        (["--to", "hf", "a", "--quiet", "b"], "a", "b"),
        (["a", "--to=hf", "b"], "a", "b"),
        (["--quiet", "--", "a", "-b"], "a", "-b"),
    ],
    ids=str,
)
def test_words_may_stand_among_options(argv: list[str], source: str, output: str | None) -> None:
    parser = make_parser("test", "")
    parser.add_argument("source", type=str)
    parser.add_argument("output", type=str | None, nargs="?")
    parser.add_argument("--to", type=str, default="x")
    parser.add_argument("--quiet", action="store_true")
    options = parser.parse_args(options_first(parser, argv))
    assert (options.source, options.output) == (source, output)
    assert options.to == ("hf" if "hf" in "".join(argv) else "x")
    assert options.quiet == ("--quiet" in argv)
    for wrong, message in (("--too", 'did you mean "--to"'), ("--to", "expected one argument")):
        with pytest.raises(UserError, match=message):
            parser.parse_args(options_first(parser, ["a", wrong]))
