"""The kernels' shared library: compiled once for this machine, kept in the user's cache folder, verified before use.

A library is code, so it is taken from a folder and a file only that belong to this user and that no other can write to.
Its name holds the SHA-256 of its content: to map a file that is cut off ends the process with SIGBUS.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_gpt.console import note
from lit_gpt.inference.levels import LEVELS, level_arguments

SOURCES = Path(__file__).parent / "csrc"
FLAGS = ("-O3", "-ffp-contract=off", "-std=c++17", "-fno-exceptions", "-fno-rtti", "-fopenmp", "-fPIC")
COMPILE_SECONDS = 120.0
"""The most that compiling may need; it needs some seconds."""
WAIT_SECONDS = 150.0
"""The most that a process waits for another one that compiles."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Unavailable(Exception):
    """There are no kernels here; the message says why."""


def compiled_library(compiler: str, openmp: str) -> Path:
    """The shared library, compiled unless it is there already. Linux only.

    Args:
        compiler: path of g++ or one that takes its flags.
        openmp: the OpenMP library to link to.

    Raises:
        Unavailable: if it cannot be had; the message says why.
    """
    folder = _cache_folder()
    try:
        stamp = _stamp(compiler, openmp)
        found = _verified(folder, stamp)
        if found is not None:
            return found
        with _lock(folder):  # the others wait, and find what this one has compiled
            return _verified(folder, stamp) or _compile(folder, stamp, compiler, openmp)
    except OSError as error:
        raise Unavailable(f"{folder} cannot be used: {error.strerror or error}") from error


def _cache_folder() -> Path:
    """The folder for libraries in the user's cache, made if it is missing. Raises Unavailable."""
    given = Path(os.environ.get("XDG_CACHE_HOME") or ".")
    try:
        cache = given if given.is_absolute() else Path.home() / ".cache"  # as the XDG specification has it
    except RuntimeError as error:
        raise Unavailable(f"there is no home folder for a cache ({error}): set XDG_CACHE_HOME") from error
    folder = cache / "lit_gpt" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise Unavailable(f"{folder} cannot be used: {error.strerror or error}") from error
    if status.st_uid != os.geteuid():
        raise Unavailable(f"{folder} belongs to another user: set XDG_CACHE_HOME to a folder of your own")
    if status.st_mode & _OTHERS_WRITE:
        raise Unavailable(f"other users can write to {folder}: remove it, or chmod go-w it")
    return folder


def _stamp(compiler: str, openmp: str) -> str:
    """From what the library is made and with what, as 16 hexadecimal digits."""
    tools = f"{compiler} {os.stat(compiler).st_mtime_ns} {openmp} {FLAGS} {LEVELS[platform.machine()]}"
    files = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    sources = b"".join(path.name.encode() + path.read_bytes() for path in files)
    return hashlib.sha256(sources + tools.encode(errors="surrogateescape")).hexdigest()[:16]


def _file_name(stamp: str, content: bytes) -> str:
    return f"kernels-{stamp}-{hashlib.sha256(content).hexdigest()}.so"


def _verified(folder: Path, stamp: str) -> Path | None:
    """The library of that stamp if there is one, it is this user's, and its content is what was compiled."""
    return next((path for path in sorted(folder.glob(f"kernels-{stamp}-*.so")) if _is_whole(path, stamp)), None)


def _is_whole(path: Path, stamp: str) -> bool:
    try:
        status = path.lstat()
        is_private = status.st_uid == os.geteuid() and not status.st_mode & _OTHERS_WRITE
        return is_private and stat.S_ISREG(status.st_mode) and path.name == _file_name(stamp, path.read_bytes())
    except OSError:
        return False


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; the kernel releases it when a process dies. Raises Unavailable after `WAIT_SECONDS`."""
    import fcntl  # not everywhere: this module is imported on all systems

    path, deadline = folder / "lock", time.monotonic() + WAIT_SECONDS
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise Unavailable(f"another process has held {path} for {WAIT_SECONDS:.0f} s") from None
            time.sleep(0.05)
        yield
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process forked meanwhile shares the descriptor
    finally:
        os.close(descriptor)


def _compile(folder: Path, stamp: str, compiler: str, openmp: str) -> Path:
    """Compile and link the sources; the file appears whole. Only with the lock held.

    Raises:
        Unavailable: if the compiler fails.
        OSError: if the folder cannot be written.
    """
    for path in folder.glob("building-*"):  # of processes that were killed
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"kernels-{stamp}-*.so"):  # damaged, or it would have been used
        with suppress(OSError):
            path.unlink()
    note("compiling the kernels for this kind of CPU, once: some seconds")
    with tempfile.TemporaryDirectory(dir=folder, prefix="building-") as building:
        made, parts = Path(building) / "kernels.so", compile_commands(compiler, Path(building))
        _run_all(list(parts.values()), building)
        _run_all([[compiler, "-shared", *map(str, parts), openmp, "-o", str(made)]], building)
        made.chmod(0o700)
        target = folder / _file_name(stamp, made.read_bytes())
        made.replace(target)
    return target


def compile_commands(compiler: str, folder: Path, machine: str | None = None) -> dict[Path, list[str]]:
    """For each object file of the library, in `folder`, the command that makes it, for this machine or another kind."""
    sources = {"dispatch": ["-c", str(SOURCES / "dispatch.cpp")]}
    for name, source in LEVELS[machine or platform.machine()].items():
        sources[name] = [*level_arguments(name, source), "-c", str(SOURCES / "level.cpp")]
    objects = {folder / f"{name}.o": arguments for name, arguments in sources.items()}
    return {path: [compiler, *FLAGS, *arguments, "-o", str(path)] for path, arguments in objects.items()}


def _run_all(commands: list[list[str]], scratch: str) -> None:
    """Run the compiler's commands, as many at once as there are cores, with `scratch` for their temporary files.

    Raises:
        Unavailable: with what the first one that failed said, when none is running any more.
    """
    waiting, running = list(commands), list[subprocess.Popen[bytes]]()
    deadline = time.monotonic() + COMPILE_SECONDS
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                running.append(_start(waiting.pop(0), scratch))
            _wait(running.pop(0), deadline)
    finally:
        for process in running:
            _kill(process)


def _start(command: list[str], scratch: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "TMPDIR": scratch}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, start_new_session=True, **pipes)  # type: ignore[call-overload]


def _wait(process: subprocess.Popen[bytes], deadline: float) -> None:
    """Until it ends; it is killed with what it started if it does not in time. Raises Unavailable if it fails."""
    compiler = str(process.args[0])  # type: ignore[index]
    try:
        said = process.communicate(timeout=max(0.0, deadline - time.monotonic()))[1].decode(errors="replace").strip()
    except BaseException as error:
        _kill(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise Unavailable(f"{compiler} failed: it ran past {COMPILE_SECONDS:.0f} s") from error
        raise
    if process.returncode != 0:
        reason = said.splitlines()[0] if said else f"exit status {process.returncode}"
        raise Unavailable(f"{compiler} failed: {reason}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and what it started: g++ is only the driver, its children do the work."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
