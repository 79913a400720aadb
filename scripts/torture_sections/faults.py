"""Fault points: a child that kills itself, or whose disk is full, at the n-th call of a function or the n-th byte.

All of it is patched in the forked child, before the program begins: the program has no hooks for this.
"""

from __future__ import annotations

import builtins
import errno
import functools
import io
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from torture_sections.children import Child, Ended, Work, run
from torture_sections.section import Tally, check

POINTS: dict[str, tuple[str, str]] = {
    "fsync": ("os", "fsync"),
    "replace": ("os", "replace"),
    "rename": ("os", "rename"),
    "mkdir": ("os", "mkdir"),
    "unlink": ("os", "unlink"),
    "validation step": ("lit_gpt.train.module.LitGPT", "validation_step"),
    "training step": ("lit_gpt.train.module.LitGPT", "training_step"),
}
"""The functions at whose calls a process can be killed: their owner, and their name there."""
BYTE = "byte"
"""The point that counts bytes instead of calls: those that are written to files."""


@dataclass(frozen=True)
class Fault:
    """What happens at a fault point.

    Attributes:
        point: a key of `POINTS`, or `BYTE`.
        call: which call of it, from 1; of `BYTE` after how many bytes.
        signals: that the process sends to itself; none for a full disk, which only `BYTE` can have.
        after: at the end of the call, not at its beginning.
        files: which files count for `BYTE`: those whose path holds this.
    """

    point: str
    call: int
    signals: tuple[int, ...] = (int(signal.SIGKILL),)
    after: bool = False
    files: str = ""

    def __str__(self) -> str:
        names = " ".join(signal.Signals(number).name for number in self.signals) or "no space"
        return f"{names} {'after' if self.after else 'at'} {self.point} {self.call} {self.files}".rstrip()

    def within(self, work: Work) -> Work:
        """That work, with this fault in it."""

        def faulty() -> int | None:
            self.install()
            return work()

        return faulty

    def install(self) -> None:
        """Patch this process."""
        if self.point == BYTE:
            _watch_files(self)
            return
        owner, name = POINTS[self.point]
        holder, calls = _resolve(owner), itertools.count(1)
        real: Callable[..., Any] = getattr(holder, name)

        @functools.wraps(real)
        def patched(*arguments: Any, **options: Any) -> Any:
            is_last = next(calls) == self.call
            if is_last and not self.after:
                self.strike()
            result = real(*arguments, **options)
            if is_last and self.after:
                self.strike()
            return result

        setattr(holder, name, patched)

    def strike(self) -> None:
        """Send the signals."""
        for number in self.signals:
            os.kill(os.getpid(), number)


def _resolve(name: str) -> Any:
    """A module, or a class in one."""
    import importlib

    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute) if module else importlib.import_module(name)


class _WatchedFile(io.FileIO):
    """A file whose bytes are counted, together with those of all others."""

    fault: Fault
    left: int | None = None  # bytes until the fault, of all files of this process: on the class; None after it

    def write(self, data: Any, /) -> int:
        """Write, up to the byte at which the fault is; the call after that has it, and has written nothing then."""
        view, left = memoryview(data).cast("B"), _WatchedFile.left
        if left == 0 and not self.fault.signals:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if left == 0:
            _WatchedFile.left = left = None
            self.fault.strike()
        done = super().write(view[:left])
        if left is not None:
            _WatchedFile.left = left - done
        return done


def _watch_files(fault: Fault) -> None:
    """Have `open` give files that count, for those below the current folder that are written to."""
    real, below = builtins.open, os.getcwd() + os.sep
    _WatchedFile.left = fault.call

    def opened(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        path = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.path.abspath(os.fsdecode(file))
        if not set(mode) & set("wax+") or not path.startswith(below) or fault.files not in path:
            return real(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = _WatchedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        raw.fault = fault
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    builtins.open = opened
    io.open = opened  # pathlib's


STOPS: tuple[tuple[signal.Signals, ...], ...] = (
    (signal.SIGKILL,),
    (signal.SIGKILL,),
    (signal.SIGKILL,),
    (signal.SIGTERM,),
    (signal.SIGINT,),
)
"""Ways to end a process; SIGKILL is the one that nothing can prepare for."""
STATUSES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130,)}
"""With which a process may end after a signal, if it was not at its end already."""


class Stopped(NamedTuple):
    """A process that was to be stopped.

    Attributes:
        ended: how it ended: with 0 if it was at its end before the signal.
        how: the fault or the time, to be repeated.
        signals: that it was sent.
    """

    ended: Ended
    how: str
    signals: tuple[signal.Signals, ...]

    def count(self, tally: Tally) -> bool:
        """Count it; False, and nothing counted, if it was at its end before the signal. Raises Wrong for a bad end."""
        tally.how, err = self.how, self.ended.err
        if self.ended.status == 0:
            return False
        tally.count += 1
        tally.details[self.signals[0].name + (" twice" if len(self.signals) > 1 else "")] += 1
        check(self.ended.status in STATUSES[self.signals[0]], f"ended with {self.ended}")
        check("Traceback" not in err or "Exception ignored" in err, f"a traceback: {self.ended.last_line[:300]}")
        return True


def stop_once(
    folder: Path,
    work: Work,
    random: Random,
    points: dict[str, int],
    seconds: float,
    files: str = "",
    stops: tuple[tuple[signal.Signals, ...], ...] = STOPS,
) -> Stopped:
    """Do some work in `folder` and stop it.

    Args:
        folder: its current folder.
        work: to be stopped.
        random: decides how.
        points: the fault points, each with the calls (or bytes) of it among which one is chosen; none for any time.
        seconds: that the work takes.
        files: whose bytes count, as in `Fault`.
        stops: the signals among which one is chosen.

    Raises:
        Wrong: it hangs.
    """
    signals = random.choice(stops)
    if points:
        point = random.choice(sorted(points))
        fault = Fault(point, random.randint(1, points[point]), signals, random.random() < 0.5, files)
        return Stopped(run(folder, fault.within(work)), str(fault), signals)
    after = random.uniform(0.02, seconds)
    child = Child(folder, work)
    if child.wait(after) is None:
        for number in signals:
            child.send(number)
    return Stopped(child.end(), f"{signals[0].name} after {after:.3f} s", signals)


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
