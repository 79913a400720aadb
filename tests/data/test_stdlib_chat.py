"""Conversations and pairs from the documentation of Python's standard library."""

from __future__ import annotations

import gc
import hashlib
import inspect
import re
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest
from environment import ROOT

from lit_gpt.data.pairs import PreferencePair
from lit_gpt.data.stdlib_chat import stdlib_conversations, stdlib_pairs
from lit_gpt.data.stdlib_definitions import MAX_SIGNATURE, MAX_SUMMARY, Definition, library_definitions
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.chat_template import Message

FORMS = re.compile(
    r"`[\w.]+` is an? \w+ of (`[\w.]+`|the standard library)\. \S"
    r"|The signature of the \w+ is `[\w.]+\(.*\).*`\.$"
    r"|The \w+ `\w+` is in the module `[\w.]+`: `from [\w.]+ import \w+`\.$"
    r"|The methods of `[\w.]+` are `\w+`.* and `\w+`\.( It has \d+ more\.)?$"
    r"|The \w+ `[\w.]+` inherits from `.*`\.$"
)


@cache
def all_definitions() -> tuple[Definition, ...]:
    """Of this Python's library, parsed once."""
    gc.disable()  # syntax trees hold no cycles, and to look for some in all that the tests have imported takes seconds
    try:
        return tuple(library_definitions())
    finally:
        gc.enable()


@cache
def whole_library() -> list[list[Message]]:
    with patch("lit_gpt.data.stdlib_chat.library_definitions", lambda root: all_definitions()):
        return list(stdlib_conversations())


def write_library(root: Path, **modules: str) -> Path:
    for name, text in modules.items():
        path = root.joinpath(*name.split("__in__")[::-1]).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text), "utf-8")
    return root


SHAPES = '''
    """Shapes in the plane.

    A second paragraph.
    """
    import nothing_of_this_name
    raise RuntimeError("the module must not be imported")

    def area(shape, *, unit: str = "m") -> float:
        """Compute the area
        of a shape.

        Details.
        """

    def _private(x):
        """Not to be asked about."""

    if True:
        def only_here(a, b=1): ...
    else:
        def only_here(a): ...

    class Circle(Shape, metaclass=Meta):
        """A round shape."""

        def __init__(self, radius, /, colour="red"):
            """Not a method that one calls."""

        @property
        def radius(self):
            """Its radius in metres."""

        @staticmethod
        def unit():
            """A circle of radius one."""

        @classmethod
        def of_area(cls, area): ...

        async def roll(self): ...
'''


def found(root: Path) -> dict[str, Definition]:
    return {definition.path: definition for definition in library_definitions(root)}


def test_definitions_of_a_module(tmp_path: Path) -> None:
    definitions = found(write_library(tmp_path, shapes=SHAPES))
    assert list(definitions) == [
        "shapes", "shapes.area", "shapes.only_here", "shapes.Circle", "shapes.Circle.radius", "shapes.Circle.unit",
        "shapes.Circle.of_area", "shapes.Circle.roll",
    ]  # fmt: skip
    assert definitions["shapes"].summary == "Shapes in the plane."
    assert definitions["shapes.area"].summary == "Compute the area of a shape."
    assert definitions["shapes.area"].signature == "area(shape, *, unit: str='m') -> float"
    assert definitions["shapes.only_here"].signature == "only_here(a, b=1)"
    circle = definitions["shapes.Circle"]
    assert circle.signature == "Circle(radius, /, colour='red')"
    assert circle.bases == ("Shape",)
    assert circle.methods == ("unit", "of_area", "roll")
    assert definitions["shapes.Circle.radius"].kind == "property"
    assert definitions["shapes.Circle.radius"].signature == ""
    assert definitions["shapes.Circle.unit"].signature == "Circle.unit()"
    assert definitions["shapes.Circle.of_area"].signature == "Circle.of_area(area)"
    assert definitions["shapes.Circle.roll"].signature == "Circle.roll()"


def test_only_public_names_under_the_name_that_programs_import(tmp_path: Path) -> None:
    root = write_library(
        tmp_path,
        listed='__all__ = ["shown"]\ndef shown(): ...\ndef helper(): ...\n',
        _hidden="def nothing(): ...\n",
        _pydecimal="class Decimal: ...\n",
        __init____in__package="from ._parts import wheel\nfrom .engines import *\n",
        _parts__in__package="def wheel(): ...\ndef spoke(): ...\n",
        engines__in__package='__all__ = ["start"]\ndef start(): ...\ndef stop(): ...\n',
        __main____in__package="def program(): ...\n",
        test_it__in__test="def test_it(): ...\n",
        module__in__idlelib="def window(): ...\n",
        third_party="def other(): ...\n",
        broken="def (:\n",
    )
    (root / "site-packages").mkdir()
    (root / "third_party.py").rename(root / "site-packages" / "third_party.py")
    assert list(found(root)) == [
        "decimal.Decimal", "broken", "listed", "listed.shown", "package", "package.wheel", "package.engines",
        "package.start",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("docstring", "summary"),
    [
        ("f(x) -> int\n\nCount x.", ""),  # "Count x." is too short to say anything
        ("f(x) -> int\n\nCount the x that there are.", "Count the x that there are."),
        ("f(x)\n\nCount the x that there are.", "Count the x that there are."),
        ("other(x)\n\nCount the x that there are.", ""),  # a word of its own, and too short
        ("f -- count the letters", "count the letters"),
        ("F.py: count the letters", "count the letters"),
        ("for -- count the letters", "for -- count the letters"),
        (">>> f(1)\n1", ""),
        ("Return one of these:\n\n - a\n - b", ""),
        ("Count the letters. One of these:\n\n - a", "Count the letters."),
        ("A sentence of words. " * 30, ("A sentence of words. " * (MAX_SUMMARY // 21)).strip()),
        ("word " * 200, ""),
        ("Zähle die Wörter 数.", "Zähle die Wörter 数."),
    ],
)
def test_summary_is_one_paragraph_of_whole_sentences(docstring: str, summary: str, tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text(f"def f(x):\n    {docstring!r}\n", "utf-8")
    assert found(tmp_path)["m.f"].summary == summary


def test_long_signature_is_left_out(tmp_path: Path) -> None:
    names = ", ".join(f"parameter_{i}" for i in range(MAX_SIGNATURE // 12))
    (tmp_path / "m.py").write_text(f"def f({names}): ...\n", "utf-8")
    assert found(tmp_path)["m.f"].signature == ""


def test_text_in_several_definitions_is_an_answer_once(tmp_path: Path) -> None:
    same = "".join(f'def f{i}():\n    """Do the one thing that all of these do."""\n' for i in range(40))
    (tmp_path / "m.py").write_text(same, "utf-8")
    answers = [each.content for talk in stdlib_conversations(tmp_path) for each in talk if each.role == "assistant"]
    assert len(answers) >= 40
    assert sum("Do the one thing" in answer for answer in answers) <= 1


def test_name_in_two_modules_is_not_asked_for_its_module(tmp_path: Path) -> None:
    many = "".join(f"def f{i}(): ...\n" for i in range(60))
    root = write_library(tmp_path, a=many, b=many, c="".join(f"def g{i}(): ...\n" for i in range(60)))
    imports = [each.content for talk in stdlib_conversations(root) for each in talk if "`from " in each.content]
    assert imports
    assert all("from c import" in text for text in imports)


def test_folder_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no source files in"):
        list(stdlib_conversations(tmp_path))


def test_pairs_prefer_the_answer_to_the_question(tmp_path: Path) -> None:
    functions = "".join(f'def f{i}(x{i}):\n    """Do task number {i} of many."""\n' for i in range(80))
    root = write_library(tmp_path, m=functions)
    conversations = {tuple(talk) for talk in stdlib_conversations(root)}
    answers = {talk[-1].content for talk in conversations}
    pairs = list(stdlib_pairs(root))
    assert 30 <= len(pairs) <= len(conversations) / 2
    used = [pair.chosen[0].content for pair in pairs] + [pair.rejected[0].content for pair in pairs]
    assert len(set(used)) == len(used)  # none is preferred here and rejected there
    for pair in pairs:
        assert (*pair.prompt, *pair.chosen) in conversations
        (rejected,) = pair.rejected
        assert rejected.role == "assistant"
        assert rejected.content in answers
        assert rejected.content != pair.chosen[0].content


# The library of this Python


@pytest.mark.slow
def test_whole_library_gives_thousands_of_short_conversations() -> None:
    conversations = whole_library()
    assert 5000 <= len(conversations) <= 20_000
    assert Counter(len(talk) for talk in conversations).keys() == {2, 4}
    assert 0.05 < sum(len(talk) == 4 for talk in conversations) / len(conversations) < 0.4
    for talk in conversations:
        assert [message.role for message in talk] == ["user", "assistant"] * (len(talk) // 2)
        for message in talk:
            assert message.content == message.content.strip()
            assert "\n" not in message.content
        assert all(FORMS.match(message.content) for message in talk[1::2]), talk
    sizes = sorted(sum(len(message.content) for message in talk) for talk in conversations)
    assert sizes[0] >= 40
    assert sizes[-1] <= 900  # characters: about 250 tokens
    chinese = sum(not talk[0].content.isascii() for talk in conversations)
    assert 0.02 < chinese / len(conversations) < 0.3
    assert len({message.content.split("`")[0] for talk in conversations for message in talk[::2]}) >= 20


@pytest.mark.slow
def test_each_thing_is_asked_about_in_one_conversation() -> None:
    """Whichever conversations are held out, they are about other things than the rest, and have other answers."""
    questions = Counter(talk[0].content for talk in whole_library())
    assert max(questions.values()) == 1
    subjects = Counter(re.findall(r"`([^`]+)`", talk[0].content)[0] for talk in whole_library())
    qualified = {name: count for name, count in subjects.items() if "." in name}
    assert len(qualified) > 5000
    assert max(qualified.values()) == 1
    described = Counter(m.content.partition(". ")[2] for t in whole_library() for m in t[1::2] if " is a" in m.content)
    del described[""]
    assert max(described.values()) == 1


@pytest.mark.slow
def test_answers_are_what_python_says() -> None:
    definitions = {definition.path: definition for definition in all_definitions()}
    dedent = definitions["textwrap.dedent"]
    assert dedent.summary == (inspect.getdoc(textwrap.dedent) or "").split("\n\n")[0].replace("\n", " ")
    for function in (textwrap.dedent, textwrap.indent, textwrap.shorten, inspect.getdoc, subprocess.getoutput):
        written = definitions[f"{function.__module__}.{function.__name__}"].signature
        assert written.replace(" ", "") == f"{function.__name__}{inspect.signature(function)}".replace(" ", "")
    wrapper = definitions["textwrap.TextWrapper"]
    assert wrapper.methods == ("wrap", "fill")
    assert definitions["asyncio.run"].kind == "function"  # of asyncio.runners, which is not where one imports it from
    assert definitions["collections.abc.Mapping"].bases == ("Collection",)


@pytest.mark.slow
def test_same_in_every_process_and_nothing_is_imported(tmp_path: Path) -> None:
    library = Path(textwrap.__file__).parent
    for name in ("textwrap.py", "this.py", "antigravity.py", "turtle.py"):
        shutil.copy(library / name, tmp_path)
    for name in ("asyncio", "json"):
        shutil.copytree(library / name, tmp_path / name)
    script = (
        "import hashlib, sys\n"
        "from pathlib import Path\n"
        "from lit_gpt.data.stdlib_chat import stdlib_conversations\n"
        "before = set(sys.modules)\n"
        "found = stdlib_conversations(Path(sys.argv[1]))\n"
        "talks = [[(m.role, m.content) for m in talk] for talk in found]\n"
        "print(hashlib.sha256(repr(talks).encode()).hexdigest(), *sorted(set(sys.modules) - before))\n"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment)
    digest, *imported = done.stdout.split()
    here = [[(message.role, message.content) for message in talk] for talk in stdlib_conversations(tmp_path)]
    assert len(here) > 200
    assert digest == hashlib.sha256(repr(here).encode()).hexdigest()
    assert len(imported) < 10, imported
    assert set(imported).isdisjoint({"antigravity", "this", "tkinter", "turtle", "textwrap"})


@pytest.mark.slow
def test_pairs_of_the_whole_library() -> None:
    with patch("lit_gpt.data.stdlib_chat.library_definitions", lambda root: all_definitions()):
        pairs = list(stdlib_pairs())
    assert len(pairs) > 3000
    assert all(isinstance(pair, PreferencePair) for pair in pairs)
    assert all(pair.chosen != pair.rejected for pair in pairs)
