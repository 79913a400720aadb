"""A PostgreSQL server of the tests' own, where the machine has its programs."""

from __future__ import annotations

import glob
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

USER, PASSWORD = "lit_gpt", "not a secret: 1/2"


def server_program(name: str) -> str | None:
    """Path of a program of the server's, which Debian does not put on PATH."""
    return shutil.which(name) or max(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), default=None)


@contextmanager
def postgres() -> Iterator[str]:
    """A new server on loopback that asks for a password; gives the address of its database, without "postgresql://"."""
    initdb, pg_ctl = server_program("initdb"), server_program("pg_ctl")
    assert initdb and pg_ctl
    # It refuses to run as root, who owns the folders that pytest makes.
    other: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.getuid() == 0 else {}
    folder = Path(tempfile.mkdtemp(prefix="postgres"))

    def run(*command: object) -> None:
        subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, cwd=folder, **other)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    try:
        (folder / "password").write_text(PASSWORD)
        if other:
            for path in (folder, folder / "password"):
                shutil.chown(path, **other)
        run(
            initdb, "--no-sync", "-A", "scram-sha-256", "-U", USER, f"--pwfile={folder}/password", "-D", folder / "data"
        )
        run(pg_ctl, "-D", folder / "data", "-l", folder / "log", "-w", "-o", options, "start")
        try:
            yield f"{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{port}/postgres"
        finally:
            run(pg_ctl, "-D", folder / "data", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
