"""The public modules, classes, functions and methods of Python's standard library, as its source files describe them.

The sources are parsed, nothing of them is imported or executed.
"""

from __future__ import annotations

import ast
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from lit_gpt.data.sources import SKIPPED_STDLIB_FOLDERS
from lit_gpt.errors import UserError

Kind = Literal["module", "class", "exception", "function", "method", "property"]
MAX_SUMMARY = 420  # characters
MAX_SIGNATURE = 200  # characters
_MIN_SUMMARY = 12  # characters
# Applications that are installed with the library, tables of data, and what Python 3.12 has no longer.
_SKIPPED_PACKAGES = frozenset({"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "turtledemo", "encodings"})
# Modules in C, or whose name begins with "_", whose text in Python has the names of a public one.
_PUBLIC_NAMES = {
    "_collections_abc": "collections.abc",
    "_py_abc": "abc",
    "_pydatetime": "datetime",
    "_pydecimal": "decimal",
    "_pyio": "io",
}
_Scope: TypeAlias = "ast.Module | ast.ClassDef"
_Function: TypeAlias = "ast.FunctionDef | ast.AsyncFunctionDef"
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_Export: TypeAlias = (
    "tuple[str, frozenset[str] | None]"  # the package that imports from a module; the names, None for *
)


@dataclass(frozen=True)
class Definition:
    """Something that the library defines.

    Attributes:
        module: from which a program imports it: `textwrap`.
        name: in the module, `TextWrapper.fill`; "" for the module itself.
        kind: of it; a class that is named as an exception is one.
        signature: as it is called, `TextWrapper.fill(text)`; "" where the source does not say, or at great length.
        summary: the first paragraph of its documentation, on one line; "" if there is none.
        bases: of a class, as written.
        methods: of a class, the public ones that it defines itself.
    """

    module: str
    name: str
    kind: Kind
    signature: str = ""
    summary: str = ""
    bases: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()

    @property
    def path(self) -> str:
        """`textwrap.TextWrapper.fill`, the name in full."""
        return f"{self.module}.{self.name}" if self.name else self.module


def library_definitions(root: Path | None = None) -> Iterator[Definition]:
    """All public definitions below `root`, each once, by modules in the order of their paths.

    Args:
        root: the folder of the library; by default that of this Python.

    Raises:
        UserError: it holds no modules.
    """
    folder = Path(sysconfig.get_path("stdlib")) if root is None else root
    exports: dict[str, _Export] = {}  # a package comes before its modules
    seen: set[str] = set()
    for name, path in _modules(folder):
        tree = _parse(path)
        exports |= _exports(name, tree)
        for definition in _definitions(name, tree, exports.get(name)):
            if definition.path not in seen:
                seen.add(definition.path)
                yield definition
    if not seen:
        raise UserError(f"stdlib-chat: this Python has no source files in {folder}; name conversations of your own")


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """The dotted names and files of all modules, private ones too, in the order of their names."""
    found = {}
    for folder, folders, files in os.walk(root):
        skipped = SKIPPED_STDLIB_FOLDERS | (_SKIPPED_PACKAGES if Path(folder) == root else set())
        folders[:] = [name for name in folders if name.isidentifier() and name not in skipped]
        for path in (Path(folder, name) for name in files if name.endswith(".py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[-1].isidentifier() and parts[-1] != "__main__":
                found[".".join(parts).removesuffix(".__init__")] = path
    return iter(sorted(found.items()))


def _parse(path: Path) -> ast.Module:
    """The tree of a file; an empty one of a file that this Python could not import either."""
    try:
        with tokenize.open(path) as file:
            return ast.parse(file.read())
    except (SyntaxError, UnicodeDecodeError):
        return ast.Module([], [])


# Names -----------------------------------------------------------------------------------------------------------


def _exports(package: str, tree: ast.Module) -> dict[str, _Export]:
    """What `package/__init__.py` imports of its own modules, by module."""
    found: dict[str, _Export] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.level <= 1:
            module = f"{package}.{node.module}" if node.level else node.module
            names = frozenset(alias.name for alias in node.names if alias.asname is None)
            if module.startswith(f"{package}."):
                found[module] = package, None if names == {"*"} else names
    return found


def _definitions(module: str, tree: ast.Module, exported: _Export | None) -> Iterator[Definition]:
    """The module, if it is public, and what it defines, under the name of the package that exports it."""
    is_public = not any(part.startswith("_") for part in module.split("."))
    home = _PUBLIC_NAMES.get(module, module if is_public else None)
    if is_public:
        yield Definition(module, "", "module", summary=_summary(tree, module))
    listed = _listed_names(tree)
    for node in _statements(tree):
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            package, names = exported or ("", frozenset())
            own = node.name in listed if listed is not None else not node.name.startswith("_")
            if exported is not None and (own if names is None else node.name in names):
                yield from _definition(package, node)
            elif own and home is not None:
                yield from _definition(home, node)


def _listed_names(tree: ast.Module) -> frozenset[str] | None:
    """`__all__`, if it is written out."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return frozenset(map(str, ast.literal_eval(node.value)))
            except ValueError:
                return None
    return None


def _statements(scope: _Scope) -> Iterator[ast.stmt]:
    """The statements of a module or class, those within `if`, `try` and `with` included."""
    waiting: list[ast.stmt] = list(reversed(scope.body))
    while waiting:
        node = waiting.pop()
        yield node
        inner: Iterable[ast.stmt] = ()
        if isinstance(node, ast.If):
            inner = (*node.body, *node.orelse)
        elif isinstance(node, ast.Try):
            inner = (*node.body, *(line for handler in node.handlers for line in handler.body), *node.orelse)
        elif isinstance(node, ast.With):
            inner = node.body
        waiting += reversed(list(inner))


# Classes and functions -------------------------------------------------------------------------------------------


def _definition(module: str, node: ast.ClassDef | _Function) -> Iterator[Definition]:
    """A function, or a class with its public methods and properties."""
    if not isinstance(node, ast.ClassDef):
        yield Definition(module, node.name, "function", _signature(node.name, node), _summary(node, node.name))
        return
    inner = {each.name: each for each in reversed(list(_statements(node))) if isinstance(each, _FUNCTIONS)}
    public = {name: inner[name] for name in reversed(inner) if not name.startswith("_")}
    methods = tuple(name for name, each in public.items() if not _is_property(each))
    bases = tuple(map(ast.unparse, node.bases))
    start = inner.get("__init__") or inner.get("__new__")
    signature = "" if start is None else _signature(node.name, start, bound=True)
    kind: Kind = "exception" if node.name.endswith(("Error", "Exception", "Warning")) else "class"
    yield Definition(module, node.name, kind, signature, _summary(node, node.name), bases, methods)
    for name, each in public.items():
        path = f"{node.name}.{name}"
        if _is_property(each):
            yield Definition(module, path, "property", summary=_summary(each, name))
        else:
            bound = not _has_decorator(each, "staticmethod")
            yield Definition(module, path, "method", _signature(path, each, bound), _summary(each, name))


def _has_decorator(node: _Function, *names: str) -> bool:
    """Whether the name of a decorator, or its last part, is one of `names`."""
    written = (ast.unparse(each).partition("(")[0] for each in node.decorator_list)
    return any(text.rpartition(".")[2] in names for text in written)


def _is_property(node: _Function) -> bool:
    return _has_decorator(node, "property", "cached_property", "abstractproperty", "setter", "DynamicClassAttribute")


def _signature(path: str, node: _Function, bound: bool = False) -> str:
    """`path(…)` with parameters, defaults and annotations as the source has them; `bound` leaves the first one out."""
    arguments = node.args
    if bound:
        positional = [*arguments.posonlyargs, *arguments.args][1:]
        only = max(0, len(arguments.posonlyargs) - 1)
        defaults = arguments.defaults[-len(positional) :] if positional else []
        arguments = ast.arguments(
            positional[:only], positional[only:], arguments.vararg, arguments.kwonlyargs, arguments.kw_defaults,
            arguments.kwarg, defaults,
        )  # fmt: skip
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    text = f"{path}({ast.unparse(arguments)}){result}"
    return text if len(text) <= MAX_SIGNATURE else ""


# Documentation ---------------------------------------------------------------------------------------------------


_CALLED = re.compile(r"([\w.]*)\(")
_RETURNS = re.compile(r"[^.]*->")
_AFTER_NAME = re.compile(r"(\.py)?\s*(--?|:)\s+", flags=re.IGNORECASE)


def _summary(node: _Scope | _Function, name: str) -> str:
    """The first paragraph of prose in the docstring, on one line and of whole sentences; "" if there is none."""
    paragraphs = re.split(r"\n\s*\n", ast.get_docstring(node) or "")
    called = _CALLED.match(paragraphs[0])  # no expressions with the name in them: one for each of thousands is slow
    if len(paragraphs) > 1 and ((called and called[1].endswith(name)) or _RETURNS.match(paragraphs[0])):
        del paragraphs[0]  # the signature by hand
    text = " ".join(paragraphs[0].split())
    if text.lower().startswith(name.lower()) and (after := _AFTER_NAME.match(text, len(name))):
        text = text[after.end() :]
    if text.startswith((">>>", "-", "*", "=")) or "::" in text:
        return ""
    if len(text) > MAX_SUMMARY or text.endswith(":"):
        text = _whole_sentences(text[:MAX_SUMMARY])
    return text if len(text) >= _MIN_SUMMARY else ""


def _whole_sentences(text: str) -> str:
    """The sentences of `text` that end in it; "" if none does."""
    ends = [match.end(1) for match in re.finditer(r"([.!?])(?:\s|$)", text)]
    return text[: ends[-1]] if ends else ""
