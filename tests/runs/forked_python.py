"""A Python that is ready in milliseconds, for sweeps under test: `forked_python.py ADDRESS -P -m lit_gpt.runs.child …`.

It has a fork server start the module that `lit_gpt.runs.child` would become, hands on SIGTERM, and ends as that does.
At the end of its stdin it kills that, and ends with it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import FrameType

MESSAGE_BYTES = 1 << 18


def main() -> None:
    address, _, _, child, *words = sys.argv[1:]
    assert child == "lit_gpt.runs.child", child
    files = Path(tempfile.mkdtemp(prefix="lit_gpt-test-"))
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.connect(address)
    asked = {"words": ["-m", *words], "cwd": os.getcwd(), "env": dict(os.environ), "files": str(files)}
    server.sendall(json.dumps(asked).encode())
    started = json.loads(server.recv(MESSAGE_BYTES))["started"]

    def hand_on(number: int, frame: FrameType | None) -> None:
        os.kill(started, number)

    signal.signal(signal.SIGTERM, hand_on)
    while server not in (ready := select.select([0, server], [], [])[0]):
        if 0 in ready and not os.read(0, 64):
            os.kill(started, signal.SIGKILL)
            server.recv(MESSAGE_BYTES)  # what this process has inherited, a lock, it keeps until that has ended
            os._exit(1)
    status = json.loads(server.recv(MESSAGE_BYTES))["status"]
    for name, descriptor in (("out", 1), ("err", 2)):
        os.write(descriptor, (files / name).read_bytes())
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
