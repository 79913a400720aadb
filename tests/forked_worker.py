"""A process that tests are run in, forked from the server that has imported what they need.

pytest-xdist starts its workers by `python -u -c CODE` and talks to them by their stdin and stdout; this script stands
in for that `python`. It needs no package, hands the three files to the fork server and ends as the child does.
"""

from __future__ import annotations

import json
import os
import socket
import sys

ADDRESS, CODE = sys.argv[1], sys.argv[-1]

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(ADDRESS)
    asked = {"words": ["-c", CODE], "cwd": os.getcwd(), "env": dict(os.environ)}
    socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
    while (message := json.loads(server.recv(4096) or b'{"status": 1}')).get("status") is None:
        pass
sys.exit(message["status"] if message["status"] >= 0 else 128 - message["status"])
