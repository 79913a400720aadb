"""`python` and `lit_gpt` as commands of shell scripts and notebooks: processes that the fork server makes.

They have the package that PYTHONPATH leads to, be it a changed copy or an installed one: where it is not the server's
own, what the server has imported of its own is forgotten. What stays is torch and Lightning, which take the seconds.

This file is both ends of a command: run by the shell it asks the server, and in the forked process it does the work.
"""

from __future__ import annotations

import importlib.machinery
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from fork_server import ADDRESS, ForkServer

IN_THE_FORK = "--in-the-fork"


def command_folder(folder: Path, server: ForkServer) -> dict[str, str]:
    """Make a folder with the two commands; the environment that finds them, and with them the server."""
    folder.mkdir()
    for name, words in (("python", '"$@"'), ("lit_gpt", '-m lit_gpt "$@"')):
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{__file__}" {words}\n')
        path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}", ADDRESS: address_of(server)}


def address_of(server: ForkServer) -> str:
    """Where it listens: the server that all workers share, or this process's own."""
    server._connected()
    return os.environ[ADDRESS] if server._own is None else server._own.address


def forked(*words: object) -> tuple[object, ...]:
    """What the server must be asked for to run `python WORDS` with the package that PYTHONPATH leads to."""
    return __file__, IN_THE_FORK, *words


def ask(words: Sequence[str]) -> int:
    """Have the server run `python WORDS`, and pass on what it writes; its exit status."""
    done = ForkServer().run(*forked(*words))
    sys.stdout.buffer.write(done.stdout.encode())
    sys.stderr.buffer.write(done.stderr.encode())
    return done.returncode


def forget_other_package() -> None:
    """Forget the imported package, and where it was found, unless it is the one that is found now."""
    found, here = importlib.machinery.PathFinder.find_spec("lit_gpt"), sys.modules["lit_gpt"].__file__
    assert found is not None and found.origin is not None and here is not None
    if found.origin == here:
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == "lit_gpt"]:
        del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(here).parent.parent]


def work(words: Sequence[str]) -> None:
    """Be `python WORDS`."""
    forget_other_package()
    kind, *rest = words
    sys.argv = rest if kind in ("-c", "-m") else list(words)
    if kind == "-c":
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    if sys.argv[1] == IN_THE_FORK:
        work(sys.argv[2:])
    else:
        sys.exit(ask(sys.argv[1:]))
