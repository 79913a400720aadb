"""A Python that is ready in milliseconds, for what starts `sys.executable`: sweeps, Lightning's launcher, torchrun.

`forked_python.py ADDRESS [-P] [-u] SCRIPT …` has a fork server start the script, or the module after `-m`: of `-m
lit_gpt.runs.child MODULE …` the module that this would become. It hands on SIGTERM and ends as the started process
does. Killed, or at the end of a pipe that is its stdin, it takes that process with it.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import stat
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # this Python starts without paths
    from fork_server import ForkServer

MESSAGE_BYTES = 1 << 18
SERVER = "LIT_GPT_TEST_FORK_SERVER"
"""The variable with the socket of a server that several processes share."""


def make_python(path: Path, fork_server: ForkServer) -> Path:
    """Write an executable file that is this Python."""
    fork_server._connected()
    address = os.environ.get(SERVER) or fork_server._own.address  # type: ignore[union-attr]
    words = shlex.join([sys.executable, "-S", "-E", str(Path(__file__).resolve()), address])
    path.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
    path.chmod(0o755)
    return path


def started_words(words: list[str]) -> list[str]:
    """What the fork server is asked for: `-m` and a module or a script, and its arguments."""
    while words[0] in ("-P", "-u"):
        words = words[1:]
    return ["-m", *words[2:]] if words[:2] == ["-m", "lit_gpt.runs.child"] else words


def main() -> None:
    address, *words = sys.argv[1:]
    files = Path(tempfile.mkdtemp(prefix="lit_gpt-test-"))
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(address)
    asked = {"words": started_words(words), "cwd": os.getcwd(), "env": dict(os.environ), "files": str(files)}
    server.sendall(json.dumps(asked).encode())
    started = json.loads(server.recv(MESSAGE_BYTES))["started"]

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(started, number)

    signal.signal(signal.SIGTERM, hand_on)
    watched = [server, 0] if stat.S_ISFIFO(os.fstat(0).st_mode) else [server]
    while server not in (ready := select.select(watched, [], [])[0]):
        if 0 in ready and not os.read(0, 64):
            os.kill(started, signal.SIGKILL)
            server.recv(MESSAGE_BYTES)  # what this process has inherited, a lock, it keeps until that has ended
            os._exit(1)
    status = json.loads(server.recv(MESSAGE_BYTES))["status"]
    for name, descriptor in (("out", 1), ("err", 2)):
        os.write(descriptor, (files / name).read_bytes())
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
