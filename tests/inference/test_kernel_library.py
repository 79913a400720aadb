"""The cache of the compiled kernels: damaged, foreign, unwritable, and wanted by many processes at once."""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
from environment import ROOT

from lit_gpt.inference import kernel_library, native
from lit_gpt.inference.kernel_library import Unavailable, compiled_library
from lit_gpt.inference.levels import LEVELS

pytestmark = pytest.mark.kernels

CONTENT = b"what the compiler made"
RUNS = len(LEVELS[platform.machine()]) + 2
"""Of the compiler for one library: each level, what chooses between them, and linking."""


class Compiler:
    """A compiler that writes `CONTENT` to its output, and counts how often it was run."""

    def __init__(self, folder: Path, before: str = "") -> None:
        self.path, self._log = folder / "c++", folder / "log"
        copy = 'while [ "$1" != -o ]; do shift; done; printf "%s" "$CONTENT" > "$2"'
        self.path.write_text(f'#!/bin/sh\necho run >> "{self._log}"\nCONTENT="{CONTENT.decode()}"\n{before}\n{copy}\n')
        self.path.chmod(0o755)

    @property
    def runs(self) -> int:
        return len(self._log.read_text().splitlines()) if self._log.exists() else 0

    def library(self) -> Path:
        return compiled_library(str(self.path), "libgomp.so")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lit_gpt" / "kernels"


@pytest.fixture
def compiler(tmp_path: Path, cache: Path) -> Compiler:
    return Compiler(tmp_path)


def test_what_is_compiled_is_used_again(compiler: Compiler, cache: Path) -> None:
    path = compiler.library()
    assert path.parent == cache and path.read_bytes() == CONTENT
    assert cache.stat().st_mode & 0o777 == 0o700
    assert compiler.library() == path and compiler.runs == RUNS
    assert sorted(item.name for item in cache.iterdir()) == sorted([path.name, "lock"])


@pytest.mark.parametrize("damaged", [b"", CONTENT[:-1], CONTENT[::-1]], ids=["empty", "torn", "foreign"])
def test_a_damaged_library_is_compiled_again(compiler: Compiler, damaged: bytes) -> None:
    path = compiler.library()
    path.write_bytes(damaged)
    assert compiler.library() == path and path.read_bytes() == CONTENT and compiler.runs == 2 * RUNS


@pytest.mark.parametrize("kind", ["writable", "link", "folder", "other name"])
def test_a_planted_library_is_not_used(compiler: Compiler, kind: str, tmp_path: Path) -> None:
    path = compiler.library()
    if kind == "writable":
        path.chmod(0o722)
    elif kind == "link":
        path.replace(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        path.unlink()
        path.with_name(path.name.replace("-", "-0-", 1)).mkdir()
    else:
        path.unlink()
        path.with_name(f"{path.stem[:-64]}{'0' * 64}.so").write_bytes(CONTENT)
    assert compiler.library() == path and path.read_bytes() == CONTENT and compiler.runs == 2 * RUNS
    assert not path.is_symlink() and path.stat().st_mode & 0o777 == 0o700


def test_a_file_of_another_user_is_not_used(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    path = compiler.library()
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert not kernel_library._is_whole(path, path.name.split("-")[1])


def test_a_folder_that_others_can_write_to_is_refused(compiler: Compiler, cache: Path) -> None:
    compiler.library()
    for mode in (0o720, 0o702):
        cache.chmod(mode)
        with pytest.raises(Unavailable, match=r"^other users can write to .*kernels: remove it, or chmod go-w it$"):
            compiler.library()


def test_a_folder_of_another_user_is_refused(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(Unavailable, match="kernels belongs to another user: set XDG_CACHE_HOME"):
        compiler.library()
    assert compiler.runs == 0


def test_a_cache_that_cannot_be_used_is_named(
    compiler: Compiler, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match="file/lit_gpt/kernels cannot be used: Not a directory"):
        compiler.library()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # the specification: to be ignored
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(Unavailable, match=r"file/\.cache/lit_gpt/kernels cannot be used"):
        compiler.library()

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(Unavailable, match="cannot be used: Permission denied"):
        compiler.library()


def test_an_unreadable_home_and_noexec_leave_the_work_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_attempt", native._attempt.__wrapped__)

    def cannot_map(path: str) -> None:
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(ctypes, "CDLL", cannot_map)
    assert native.load() is None and "failed to map segment" in native.status()

    def unreadable(*arguments: object) -> Path:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(native, "compiled_library", unreadable)
    assert native.load() is None and "Permission denied" in native.status()


def test_eight_processes_at_once_compile_once(tmp_path: Path, cache: Path) -> None:
    compiler = Compiler(tmp_path, before="sleep 0.2")
    code = f"from lit_gpt.inference.kernel_library import *; print(compiled_library({str(compiler.path)!r}, 'x'))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(8)
    ]
    paths = {process.communicate(timeout=60)[0] for process in started}
    assert len(paths) == 1 and Path(paths.pop().strip()).read_bytes() == CONTENT
    assert compiler.runs == RUNS


def test_the_wait_for_another_process_has_an_end(
    compiler: Compiler, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_library, "WAIT_SECONDS", 0.1)
    cache.mkdir(parents=True, mode=0o700)
    with (cache / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(Unavailable, match=r"another process has held .*lock for"):
            compiler.library()
    assert compiler.library().read_bytes() == CONTENT


def test_what_a_killed_process_left_is_removed(compiler: Compiler, cache: Path) -> None:
    (cache / "building-killed").mkdir(parents=True)
    (cache / "building-killed" / "kernels.o").write_bytes(b"half")
    cache.chmod(0o700)
    compiler.library()
    assert not (cache / "building-killed").exists()


def test_a_compiler_that_never_ends_is_killed_with_its_children(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = Compiler(tmp_path, before=f'sleep 60 & echo $! > "{tmp_path}/child"; wait')
    monkeypatch.setattr(kernel_library, "COMPILE_SECONDS", 0.3)
    with pytest.raises(Unavailable, match="failed: it ran past"):
        compiler.library()
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    for _ in range(100):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.02)
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert [item.name for item in cache.iterdir()] == ["lock"]


def test_a_compiler_that_fails_is_told_of(tmp_path: Path, cache: Path) -> None:
    compiler = Compiler(tmp_path, before="echo no such option >&2; exit 1")
    with pytest.raises(Unavailable, match=r"c\+\+ failed: no such option$"):
        compiler.library()
    assert [item.name for item in cache.iterdir()] == ["lock"]
