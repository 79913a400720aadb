"""The parser of the plain subcommands."""

from __future__ import annotations

import jsonargparse._core
import jsonargparse._subcommands
import pytest
from jsonargparse import ArgumentParser

from lit_gpt.console.options import found_once, make_parser, options_first
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


def test_an_action_is_searched_once_until_its_parser_has_others() -> None:
    searched = []

    def find(parser: ArgumentParser, dest: str, exclude: type | None = None) -> tuple[object, None]:
        searched.append(dest)
        return next((a for a in parser._actions if a.dest == dest and not isinstance(a, exclude or ())), None), None

    find_once, parser = found_once(find), ArgumentParser()
    first = parser.add_argument("--first", type=int)
    for _ in range(2):
        assert find_once(parser, "first") == (first, None)
        assert find_once(parser, "first", exclude=type(first)) == (None, None) == find_once(parser, "second")
    assert searched == ["first", "first", "second"]
    second = parser.add_argument("--second", type=int)
    assert find_once(parser, "second") == (second, None)
    parser._actions.remove(second)
    third = parser.add_argument("--third", type=int)
    assert find_once(parser, "second") == (None, None) and find_once(parser, "third") == (third, None)


def test_what_a_subcommand_has_is_searched_each_time() -> None:
    find = jsonargparse._subcommands.find_action_and_subcommand
    parser, below = ArgumentParser(), ArgumentParser()
    parser.add_subcommands().add_subcommand("run", below)
    assert find(parser, "run.late") == (None, "run")
    late = below.add_argument("--late", type=int)
    assert find(parser, "run.late") == (late, "run")


def test_jsonargparse_searches_so() -> None:
    for module in (jsonargparse._subcommands, jsonargparse._core):
        assert module.find_action_and_subcommand.__module__ == "lit_gpt.console.options"
