"""A Python ready in milliseconds: `forked_python.py ADDRESS WORDS…` is `python WORDS…`, forked by a fork server.

It stands in for what starts `python`: shell scripts, notebooks, sweeps, Lightning's launcher, torchrun, pytest-xdist.
It needs no package, hands its stdin, stdout and stderr to the process and SIGINT and SIGTERM on to it, and ends as it
does. Killed, it takes that process with it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from types import FrameType


def main() -> None:
    address, *words = sys.argv[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.connect(address)
        asked = {"words": words, "cwd": os.getcwd(), "env": dict(os.environ)}
        socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
        started = json.loads(server.recv(4096))["started"]

        def hand_on(number: int, frame: FrameType | None) -> None:
            os.kill(started, number)

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, hand_on)
        status = json.loads(server.recv(4096) or b'{"status": 1}')["status"]
    if status < 0:
        if status != -signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
