"""Python processes forked from one that has imported torch, Lightning and the program: ready in milliseconds.

A start of the program costs seconds of processor time, nearly all of it for imports, and the tests start hundreds.
What a child does from then on is what `python …` would do; what is read while modules are imported
(PYTHON… and OMP_… variables) is as the server found it. Tests of the start itself start a real process.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import importlib.machinery
import json
import os
import random
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

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
TESTED_WITH = ("fastapi", "httpx", "openai", "peft", "playwright.sync_api", "scipy.stats", "transformers", "uvicorn")
"""What it imports besides where the processes that tests run in are forked from it too."""
READ_VARIABLES = "huggingface_hub"
"""A package that reads variables of the environment when it is imported: children with others import it anew."""

# The client ----------------------------------------------------------------------------------------------------------

ADDRESS = "LIT_GPT_TEST_FORK_SERVER"
"""The variable with the socket of a server that several processes share."""


def forked_python(address: str) -> list[str]:
    """The words of a Python that the server there forks."""
    return [sys.executable, "-I", "-S", str(Path(__file__).resolve().with_name("forked_python.py")), address]


class Server:
    """The process that forks, and its socket. It ends with this process."""

    def __init__(self, *modules: str) -> None:
        self._folder = tempfile.mkdtemp(prefix="lit_gpt-test-")
        self.address = os.path.join(self._folder, "socket")
        paths = os.pathsep.join(filter(None, sys.path))
        # No more lines of PyTorch's own on stderr than errors; one thread, since children could not use the others.
        fixed = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONPATH": paths}
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(self.address)
            listener.listen(64)
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(listener.fileno()), *modules],
                stdin=subprocess.PIPE,
                pass_fds=[listener.fileno()],
                env=os.environ | fixed,
                start_new_session=True,
            )

    def close(self) -> None:
        """End it, and with it all children."""
        self._process.communicate()
        shutil.rmtree(self._folder)


class ForkServer:
    """Starts processes by a server: the one that `ADDRESS` names, else one of its own when it is first needed."""

    def __init__(self) -> None:
        self._own: Server | None = None
        self._socket: socket.socket | None = None
        self._ended: dict[int, int] = {}

    def start(
        self,
        *words: object,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Child:
        """A process as of `python WORDS`: a script, `-m` and a module or `-c` and code, and the arguments.

        Args:
            cwd: its current folder; None for this process's.
            env: all of its environment; None for this process's.
        """
        files = Path(tempfile.mkdtemp(prefix="lit_gpt-test-"))
        asked = {
            "words": list(map(str, words)),
            "cwd": str(cwd or os.getcwd()),
            "env": dict(os.environ if env is None else env),
            "files": str(files),
        }
        self._connected().sendall(json.dumps(asked).encode())
        while True:
            message = self._receive()
            if "started" in message:
                return Child(self, message["started"], files)

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
            if not select.select([self._connected()], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            self._receive()
        return self._ended[pid]

    def write_python(self, path: Path, *words: str) -> Path:
        """Write an executable file that is `python WORDS…` by this server, for what starts processes of its own."""
        path.write_text(f'#!/bin/sh\nexec {shlex.join(forked_python(self._address()))} {shlex.join(words)} "$@"\n')
        path.chmod(0o755)
        return path

    def write_commands(self, folder: Path) -> str:
        """Make a folder with the commands `python` and `lit_gpt`; the PATH that finds them."""
        folder.mkdir()
        self.write_python(folder / "python")
        self.write_python(folder / "lit_gpt", "-m", "lit_gpt")
        return f"{folder}:{os.environ['PATH']}"

    def close(self) -> None:
        """Kill the children that are left, and end the server if it is this one's own."""
        if self._socket is not None:
            self._socket.close()
        if self._own is not None:
            self._own.close()

    def _address(self) -> str:
        if ADDRESS in os.environ:
            return os.environ[ADDRESS]
        if self._own is None:
            self._own = Server()
        return self._own.address

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._socket.connect(self._address())
        return self._socket

    def _receive(self) -> dict[str, int]:
        """The next message, kept if it is of an end."""
        received = self._connected().recv(MESSAGE_BYTES)
        assert received, "the fork server has ended"
        message: dict[str, int] = json.loads(received)
        if "ended" in message:
            self._ended[message["ended"]] = message["status"]
        return message


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
        paths = (self._files / name for name in ("out", "err"))
        out, err = (path.read_text("utf-8", "replace") if path.exists() else "" for path in paths)
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

MESSAGE_BYTES = 1 << 18
"""Of the longest message: a socket of packets gives them whole."""


class Client:
    """A process that asks for others; they end with it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.alive: set[int] = set()

    def say(self, **message: int) -> None:
        """Send a message, if somebody is left to hear it."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode())

    def end(self) -> None:
        """Kill its children."""
        self.connection.close()
        for pid in self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def serve(listener: socket.socket) -> dict[str, Any]:
    """Fork for each request until stdin ends. Returns the request, in the children only."""
    wake, woken = os.pipe2(os.O_NONBLOCK)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    clients: dict[int, Client] = {}  # by descriptor
    while True:
        ready = select.select([0, wake, listener, *clients], [], [])[0]
        if 0 in ready:
            for client in clients.values():
                client.end()
            os._exit(0)
        if wake in ready:
            os.read(wake, 4096)
            _reap(clients.values())
        if listener in ready:
            connection = listener.accept()[0]
            clients[connection.fileno()] = Client(connection)
        for descriptor in clients.keys() & set(ready):
            client = clients[descriptor]
            received, descriptors, *_ = socket.recv_fds(client.connection, MESSAGE_BYTES, 3)
            if not received:
                clients.pop(descriptor).end()
                continue
            pid = os.fork()
            if not pid:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                for open_one in (wake, woken, listener.detach(), *clients):
                    os.close(open_one)
                for other in clients.values():
                    other.connection.detach()
                return json.loads(received) | {"descriptors": descriptors}
            for descriptor in descriptors:
                os.close(descriptor)
            client.alive.add(pid)
            client.say(started=pid)


def _reap(clients: Iterable[Client]) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        for client in clients:
            if pid in client.alive:
                client.alive.remove(pid)
                client.say(ended=pid, status=os.waitstatus_to_exitcode(status))


def become(asked: dict[str, Any]) -> None:
    """Be the process that was asked for: its exceptions and its exit are this process's."""
    os.setsid()
    os.chdir(asked["cwd"])
    for number, descriptor in enumerate(asked["descriptors"] or _open_files(asked["files"])):
        os.dup2(descriptor, number)
        os.close(descriptor)
    rereads = _read_variables(os.environ) != _read_variables(asked["env"])
    os.environ.clear()
    os.environ.update(asked["env"])
    if rereads:
        _forget(READ_VARIABLES)
    random.seed()
    importlib.import_module("numpy").random.seed()
    words = asked["words"]
    while words[0] in ("-P", "-u"):
        words = words[1:]
    first = "" if words[0] == "-c" else asked["cwd"] if words[0] == "-m" else os.path.dirname(words[0])
    sys.path[:0] = [first, *filter(None, asked["env"].get("PYTHONPATH", "").split(os.pathsep))]
    _forget_other_package()
    _run(words)


def _run(words: list[str]) -> None:
    sys.argv = words if words[0] not in ("-c", "-m") else words[1:]
    if words[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)
    elif words[0] == "-m":
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def _read_variables(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith(("HF_", "HUGGING_FACE_"))}


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _forget_other_package() -> None:
    """Forget lit_gpt, and where it was found, unless it is the one that is found now: PYTHONPATH may lead to a copy."""
    found, here = importlib.machinery.PathFinder.find_spec("lit_gpt"), sys.modules["lit_gpt"].__file__
    assert here is not None
    if found is not None and found.origin != here:  # an editable installation is not on the path
        _forget("lit_gpt")
        sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(here).parent.parent]


def _open_files(folder: str) -> list[int]:
    outputs = (os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o600) for name in ("out", "err"))
    return [os.open(os.devnull, os.O_RDONLY), *outputs]


def end_with(main: Callable[[], None]) -> NoReturn:
    """End this process as the interpreter would after `main`, but for the destructors of C++.

    Those of threads that the server had, which are not here, abort a process ("terminate called").
    """
    status = 0
    try:
        main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException as error:
        traceback.print_exc()
        status = 130 if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(ValueError, OSError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    gc.disable()  # the search for cycles would take a quarter of the time
    for name in (*MODULES, *sys.argv[2:]):
        importlib.import_module(name)
    gc.freeze()  # what is shared with the children stays shared
    gc.enable()
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    end_with(lambda: become(request))
