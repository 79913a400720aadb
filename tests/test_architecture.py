"""The structure of the package: which way imports run, how large things are, and the words that are used."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest
from environment import FIXTURES, ROOT

MODULES = sorted((ROOT / "lit_gpt").rglob("*.py"))
SOURCES = [*MODULES, *sorted((ROOT / "tests").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]

FORMER_NAMES = set((FIXTURES / "former_names.txt").read_text("utf-8").split())
"""Identifiers that were figures of speech or stood for several things; docs/architecture.md has the words in use."""
_FORMER_WORDS = re.compile(rf"\b({'|'.join(map(re.escape, sorted(FORMER_NAMES)))})\b")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


@pytest.mark.slow
def test_import_contracts_hold(tmp_path: Path) -> None:
    command = ["lint-imports", "--config", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_few_packages_with_few_imports_between_them(capsys) -> None:  # type: ignore[no-untyped-def]
    graph = grimp.build_graph("lit_gpt", cache_dir=None)
    children = sorted(graph.find_children("lit_gpt"))
    imports = {
        (a, b)
        for a in children
        for b in children
        if a != b and graph.direct_import_exists(importer=a, imported=b, as_packages=True)
    }

    @cache
    def chain(child: str) -> int:
        return 1 + max((chain(b) for a, b in imports if a == child), default=0)  # a cycle would not end

    longest = max(map(chain, children))
    with capsys.disabled():
        print(f"\n{len(children)} packages and modules, {len(imports)} imports between them, longest chain {longest}")
    assert len(children) <= 20
    assert len(imports) <= 85
    assert longest <= 9


@pytest.mark.slow
def test_no_file_is_over_400_lines_and_no_function_over_40() -> None:
    long = [
        f"{path.relative_to(ROOT)}: {n}" for path in MODULES if (n := len(path.read_text("utf-8").splitlines())) > 400
    ]
    for path in MODULES:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (n := _body_lines(node)) > 40:
                long.append(f"{path.relative_to(ROOT)}: {node.name} has {n}")
    assert long == []


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of code, without the docstring and the signature."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.slow
def test_no_class_name_stands_for_two_things() -> None:
    names = Counter(
        node.name
        for path in MODULES
        for node in ast.walk(tree(path))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


@pytest.mark.slow
def test_no_former_name_is_left() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{token.start[0]} {token.string}"
        for path in SOURCES
        if _FORMER_WORDS.search(path.read_text("utf-8"))
        for token in _names(path)
        if token.string in FORMER_NAMES
    ]
    assert found == []


def _names(path: Path) -> Iterator[tokenize.TokenInfo]:
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type == tokenize.NAME:
            yield token


def test_modules_begin_with_a_phrase_not_a_sentence_about_them() -> None:
    for path in MODULES:
        first = (ast.get_docstring(tree(path)) or "").split("\n")[0]
        assert first, path
        assert not re.match(r"(What|How|Which|Where|Who|Looking|Before)\b", first), f"{path}: {first}"
