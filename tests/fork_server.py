"""Python processes forked from one that has imported torch, Lightning and the program: ready in milliseconds.

A start of the program costs seconds of processor time, nearly all of it for imports, and the tests start hundreds.
What a child does from then on, its exit included, is what `python …` would do; what is read while modules are imported
(PYTHON… and OMP_… variables) is as the server found it. Tests of the start itself start a real process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MODULES = (
    "lightning.pytorch.loggers.tensorboard",
    "lit_gpt.api",
    "lit_gpt.cli.lightning",
    "lit_gpt.convert.main",
    "lit_gpt.convert.recognise",
    "lit_gpt.convert.write",
    "lit_gpt.data.prepare",
    "lit_gpt.insight.tokenize",
    "lit_gpt.train.callbacks.defaults",
    "rich.progress",
    "torch.utils.tensorboard",
)
"""What the server imports."""
READ_VARIABLES = "huggingface_hub"
"""A package that reads variables of the environment when it is imported: the children import it anew."""

# The client ----------------------------------------------------------------------------------------------------------


class ForkServer:
    """The process that forks, started when it is first needed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ended: dict[int, int] = {}

    def start(
        self,
        *words: object,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """A process as of `python WORDS`: a script with its arguments, or `-m`, a module and its arguments.

        Args:
            cwd: its current folder; None for this process's.
            env: all of its environment; None for this process's.
        """
        if self._process is None:
            self._process = self._start_server()
        files = Path(tempfile.mkdtemp(prefix="lit_gpt-test-"))
        asked = {
            "words": list(map(str, words)),
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "files": str(files),
        }
        self._write(asked)
        return Child(self, self._read(None)["started"], files)

    def run_ranks(
        self,
        count: int,
        *words: object,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> list[subprocess.CompletedProcess[str]]:
        """One process for each rank of a node, as a launcher other than Lightning's starts them, until they end."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        common = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        common["WORLD_SIZE"] = str(count)
        ranks = [common | {"NODE_RANK": "0", "LOCAL_RANK": str(rank)} for rank in range(count)]
        started = [self.start(*words, cwd=cwd, env=rank) for rank in ranks]
        try:
            return [child.finish(timeout) for child in started]
        finally:
            for child in started:
                child.kill()

    def run(
        self,
        *words: object,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> subprocess.CompletedProcess[str]:
        """Start it, and wait for its end."""
        return self.start(*words, cwd=cwd, env=env).finish(timeout)

    def status_of(self, pid: int, seconds: float) -> int | None:
        """The exit status of a child, as `subprocess` has it; None if it has not ended after so many seconds."""
        deadline = time.monotonic() + seconds
        while pid not in self._ended:
            message = self._read(max(0.0, deadline - time.monotonic()))
            if message is None:
                return None
            self._ended[message["ended"]] = message["status"]
        return self._ended[pid]

    def close(self) -> None:
        """End it, and with it all children."""
        if self._process is not None:
            self._process.communicate()

    def _start_server(self) -> subprocess.Popen[str]:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
            start_new_session=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()

    def _read(self, seconds: float | None) -> Any:
        """The next message, or that of a start if `seconds` is None; else None if there is none in that time."""
        assert self._process is not None and self._process.stdout is not None
        while True:
            # Lines are read whole, one at a time, by a reader that holds no more than one: see `_Lines` in the server.
            if seconds is not None and not select.select([self._process.stdout], [], [], seconds)[0]:
                return None
            line = os.read(self._process.stdout.fileno(), MESSAGE_BYTES).decode()
            assert line, "the fork server has ended"
            message = json.loads(line)
            if seconds is not None or "started" in message:
                return message
            self._ended[message["ended"]] = message["status"]


class Child:
    """A process, with the part of `subprocess.Popen` that tests use."""

    def __init__(self, server: ForkServer, pid: int, files: Path) -> None:
        self.pid = pid
        self._server, self._files = server, files
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Its exit status, None while it runs."""
        return self.wait(0.0)

    def wait(self, timeout: float = 300) -> int | None:
        """Its exit status, None if it has not ended by then."""
        if self.returncode is None:
            self.returncode = self._server.status_of(self.pid, timeout)
        return self.returncode

    def output(self) -> tuple[str, str]:
        """What it has written to stdout and stderr so far."""
        out, err = ((self._files / name).read_text("utf-8", "replace") for name in ("out", "err"))
        return out, err

    def finish(self, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end. Raises TimeoutExpired, having killed it and what it has started, if that is too long."""
        if self.wait(timeout) is None:
            self.kill()
            self.wait()
            raise subprocess.TimeoutExpired("python", timeout, *self.output())
        done = subprocess.CompletedProcess(["python"], self.returncode or 0, *self.output())
        shutil.rmtree(self._files)
        return done

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it is still running."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it, and what it has started."""
        if self.poll() is None:
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:  # it has not made its session yet
                os.kill(self.pid, signal.SIGKILL)


# The server ----------------------------------------------------------------------------------------------------------

MESSAGE_BYTES = 64
"""Of each message of the server: padded, so that one read is one message."""


def serve() -> dict[str, Any]:
    """Fork for each request on stdin. Returns the request, in the children only."""
    wake, woken = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    os.write(1, b"ready\n")
    received, alive = b"", set()
    while True:
        ready = select.select([0, wake], [], [])[0]
        if wake in ready:
            os.read(wake, 4096)
            for pid, status in iter(_reap, None):
                alive.discard(pid)
                _say(ended=pid, status=status)
        if 0 in ready:
            part = os.read(0, 1 << 16)
            if not part:
                _end_all(alive)
            received += part
        while b"\n" in received:
            line, received = received.split(b"\n", 1)
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wake)
                os.close(woken)
                return json.loads(line)  # type: ignore[no-any-return]
            alive.add(pid)
            _say(started=pid)


def _say(**message: int) -> None:
    os.write(1, json.dumps(message).ljust(MESSAGE_BYTES).encode())


def _reap() -> tuple[int, int] | None:
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, os.waitstatus_to_exitcode(status)) if pid else None


def _end_all(alive: set[int]) -> None:
    for pid in alive:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    os._exit(0)


def become(asked: dict[str, Any]) -> None:
    """Be the process that was asked for: its exceptions and its exit are this process's."""
    os.setsid()
    os.chdir(asked["cwd"])
    names = ((os.devnull, os.O_RDONLY), *((f"{asked['files']}/{n}", os.O_WRONLY | os.O_CREAT) for n in ("out", "err")))
    for number, (path, mode) in enumerate(names):
        descriptor = os.open(path, mode, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(asked["env"])
    for name in [name for name in sys.modules if name.partition(".")[0] == READ_VARIABLES]:
        del sys.modules[name]
    random.seed()
    importlib.import_module("numpy").random.seed()
    words = asked["words"]
    is_module = words[0] == "-m"
    sys.path[:0] = filter(None, [asked["cwd"] if is_module else os.path.dirname(words[0]), *_python_path(asked["env"])])
    if is_module:
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _python_path(env: Mapping[str, str]) -> Sequence[str]:
    return env.get("PYTHONPATH", "").split(os.pathsep)


if __name__ == "__main__":
    for name in MODULES:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # what is shared with the children stays shared
    become(serve())
