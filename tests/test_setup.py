"""setup.py: when the kernels' library is compiled, when it is not, and what happens where it cannot be."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
from environment import ROOT

from lit_gpt.inference import kernel_library
from lit_gpt.inference.kernel_library import check_library
from lit_gpt.inference.levels import LEVELS

MACHINE = platform.machine()
pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or MACHINE not in LEVELS, reason="no kernels for this kind of machine"
)

CONTENT = b"what the compiler made"
RUNS = len(LEVELS.get(MACHINE, ())) + 2
"""Of the compiler for one library: each level, what chooses between them, and linking."""


class Builder:
    """setup.py's functions with a compiler that writes `CONTENT` to its output, and counts how often it was run.

    Attributes:
        target: where the library is built.
        in_place: where an editable installation has it.
    """

    def __init__(self, module: ModuleType, folder: Path) -> None:
        self.module, self.folder = module, folder
        self.target, self.in_place = folder / "lib/libkernels.so", folder / "source/libkernels.so"
        self.in_place.parent.mkdir()
        self.compiler, self._log = folder / "c++", folder / "log"
        self.write_compiler()

    def write_compiler(self, before: str = "") -> None:
        copy = f'while [ "$1" != -o ]; do shift; done; printf "%s" "{CONTENT.decode()}" > "$2"'
        self.compiler.write_text(f'#!/bin/sh\necho run >> "{self._log}"\n{before}\n{copy}\n')
        self.compiler.chmod(0o755)

    def build(self, force: bool = False) -> int:
        """How often the compiler was run for it."""
        self._log.unlink(missing_ok=True)
        self.module.build_library(self.target, self.folder / "scratch", force)
        check_library(self.target, MACHINE)
        assert self.target.read_bytes().startswith(CONTENT)
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0


@pytest.fixture
def builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Builder:
    spec = importlib.util.spec_from_file_location("setup_of_lit_gpt", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", list(sys.path))  # to which it adds its folder
    spec.loader.exec_module(module)
    made = Builder(module, tmp_path)
    monkeypatch.setenv("CXX", str(made.compiler))
    monkeypatch.setattr(module, "LIBRARY", made.in_place)
    monkeypatch.setattr(ctypes, "CDLL", lambda path: None)  # what is built here is no library
    return made


def test_it_is_compiled_once(builder: Builder) -> None:
    assert builder.build() == RUNS
    assert builder.target.stat().st_mode & 0o777 == 0o755
    assert builder.build() == 0
    assert builder.build(force=True) == RUNS


def test_it_is_compiled_again_for_other_sources(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    builder.build()
    shutil.copytree(kernel_library.SOURCES, builder.folder / "csrc")
    monkeypatch.setattr(kernel_library, "SOURCES", builder.folder / "csrc")
    assert builder.build() == 0, "the same sources, with another time"
    with (builder.folder / "csrc/level.cpp").open("a") as file:
        file.write("// changed\n")
    assert builder.build() == RUNS


@pytest.mark.parametrize("damage", [b"", CONTENT], ids=["empty", "without a stamp"])
def test_a_damaged_one_is_replaced(builder: Builder, damage: bytes) -> None:
    builder.build()
    builder.target.write_bytes(damage)
    assert builder.build() == RUNS


def test_one_that_this_machine_cannot_load_is_replaced(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a checkout that a machine with a newer C library shares."""

    def fail(path: str) -> None:
        raise OSError("version `GLIBC_2.99' not found")

    builder.build()
    monkeypatch.setattr(ctypes, "CDLL", fail)
    assert builder.build() == RUNS


def test_that_of_an_editable_installation_is_used(builder: Builder) -> None:
    builder.build()
    shutil.move(builder.target, builder.in_place)
    assert builder.build() == 0
    builder.target.unlink()
    builder.in_place.write_bytes(b"older")
    assert builder.build() == RUNS


def test_a_compiler_that_fails_leaves_nothing(builder: Builder) -> None:
    builder.build()
    builder.target.write_bytes(b"older")
    builder.write_compiler("echo In file included from x: >&2; echo x.h:1: error: no such option >&2; exit 1")
    with pytest.raises(builder.module.CompileError, match=r"c\+\+: x.h:1: error: no such option$"):
        builder.build()
    assert list(builder.target.parent.iterdir()) == []


def test_a_compiler_is_a_command_with_arguments(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", f"env {builder.compiler}")
    assert builder.build() == RUNS


def test_a_compiler_that_is_missing_is_named(builder: Builder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/c++ -m64")
    with pytest.raises(builder.module.CompileError, match=r"^/no/such/c\+\+ was not found$"):
        builder.build()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(builder.folder / "scratch"))
    with pytest.raises(builder.module.CompileError, match=r"^neither g\+\+ nor c\+\+ was found \(or set CXX\)$"):
        builder.build()
