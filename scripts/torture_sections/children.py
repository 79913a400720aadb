"""Processes that run the program: forked from this one, which has imported everything, in place of started anew.

A start costs seconds, most of them for imports; a fork costs milliseconds, so that a hundred kills take minutes. It
is safe because this process computes nothing with torch and has no threads when it forks.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from torture_sections.section import Wrong, check

Work = Callable[[], int | None]

MODULES = (
    "lit_gpt.api",
    "lit_gpt.cli.lightning",
    "lit_gpt.convert.main",
    "lit_gpt.convert.recognise",
    "lit_gpt.convert.write",
    "lit_gpt.data.prepare",
    "lit_gpt.insight.tokenize",
    "lightning.pytorch.loggers.tensorboard",
    "torch.utils.tensorboard",
    "rich.progress",
)
"""What the program imports when it runs."""

TIMEOUT = 120.0
"""Seconds after which a process that should have ended is called hung."""

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_alive: set[int] = set()


def import_everything() -> None:
    """Import what the children need. Before this no module may have read OMP_NUM_THREADS."""
    for name in MODULES:
        importlib.import_module(name)


def end_all() -> None:
    """Kill the children that are still running, with the processes that they have started."""
    for pid in list(_alive):
        _kill_group(pid)
        os.waitpid(pid, 0)
        _alive.discard(pid)


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:  # it has not made its group yet
        os.kill(pid, signal.SIGKILL)


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: its exit status, or minus the signal that killed it.
        out: what it wrote to stdout.
        err: what it wrote to stderr.
        seconds: from its start to its end.
        grown: the most memory that it held above what it began with, in MB; 0 for one that was killed.
    """

    status: int
    out: str
    err: str
    seconds: float
    grown: float

    @property
    def last_line(self) -> str:
        """The last line on stderr."""
        return (self.err.strip().splitlines() or [""])[-1]

    def __str__(self) -> str:
        return f"status {self.status}: {self.last_line[:300]}"


class Child:
    """A forked process that does some work in a folder, in a process group of its own."""

    def __init__(self, folder: Path, work: Work) -> None:
        """Start it.

        Args:
            folder: its current folder.
            work: gives its exit status, None for 0.
        """
        self._files = Path(tempfile.mkdtemp(prefix="lit_gpt-child-"))
        self._ended: Ended | None = None
        self._began = time.monotonic()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # until the child is ready for them
        self.pid = os.fork()
        if not self.pid:
            _be_the_child(folder, work, self._files)
        _alive.add(self.pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def wait(self, seconds: float = TIMEOUT) -> Ended | None:
        """How it ended, None if it is still running after so many seconds."""
        if self._ended is None:
            descriptor = os.pidfd_open(self.pid)
            try:
                if not select.select([descriptor], [], [], max(0.0, seconds))[0]:
                    return None
            finally:
                os.close(descriptor)
            status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
            _alive.discard(self.pid)
            self._ended = self._read(status)
        return self._ended

    def _read(self, status: int) -> Ended:
        texts = {path.name: path.read_text("utf-8", "replace") for path in self._files.iterdir()}
        for path in self._files.iterdir():
            path.unlink()
        self._files.rmdir()
        grown = float(texts.get("grown") or 0)
        return Ended(status, texts.get("out", ""), texts.get("err", ""), time.monotonic() - self._began, grown)

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        ended = self.wait(0)
        return None if ended is None else ended.status

    def end(self) -> Ended:
        """How it ended. Raises Wrong, having killed it, if it hangs."""
        ended = self.wait()
        if ended is None:
            _kill_group(self.pid)
            ended = self.wait()
            raise Wrong(f"hung for {TIMEOUT:.0f} s: {'' if ended is None else ended.last_line[:300]}")
        return ended

    def send(self, number: int) -> None:
        """Send it a signal, if it is still running."""
        if self._ended is None:
            os.kill(self.pid, number)


def run(folder: Path, work: Work) -> Ended:
    """Fork, work, wait. Raises Wrong if it hangs."""
    return Child(folder, work).end()


def value_of(function: Callable[[], Any]) -> Any:
    """What `function` returns in a child, through JSON.

    Raises:
        Wrong: it raised an exception; its last line is in the message.
    """
    with tempfile.TemporaryDirectory(prefix="lit_gpt-value-") as folder:
        path = Path(folder) / "value"

        def work() -> None:
            path.write_text(json.dumps(function()), "utf-8")

        ended = run(Path(folder), work)
        check(ended.status == 0, str(ended))
        return json.loads(path.read_text("utf-8"))


def program(*words: object) -> Work:
    """`lit_gpt` with these words."""
    argv = [str(word) for word in words]

    def work() -> int:
        from lit_gpt.__main__ import main

        sys.argv = ["lit_gpt", *argv]
        return main(argv)

    return work


def is_refusal(ended: Ended) -> bool:
    """Whether it ended as bad input does: status 2, nothing on stdout, one line at the end of stderr."""
    clean = not any(word in ended.err for word in ("Traceback", "panicked"))
    return ended.status == 2 and ended.out == "" and clean and ended.last_line.startswith("lit_gpt: error: ")


def _be_the_child(folder: Path, work: Work, files: Path) -> NoReturn:
    status = 130  # of a second Ctrl+C while the first is handled
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        descriptors = [os.open(os.devnull, os.O_RDONLY)]
        descriptors += [os.open(files / name, os.O_WRONLY | os.O_CREAT, 0o600) for name in ("out", "err")]
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        before = _forget_peak()
        status = work() or 0
        (files / "grown").write_text(str((_memory("VmHWM") - before) / 1024))
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        status = 1
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _forget_peak() -> int:
    """Have the kernel count the peak of the memory from here on; the memory now, in kB."""
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str, pid: int | str = "self") -> int:
    """A value of /proc/PID/status in kB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def resident_memory(pid: int) -> int:
    """The resident memory of a process in kB."""
    return _memory("VmRSS", pid)
