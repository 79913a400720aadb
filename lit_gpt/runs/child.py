"""A program that ends when its parent does: `python -m lit_gpt.runs.child MODULE ARGUMENTS…`.

It is what `python -m MODULE ARGUMENTS…` would be, but its stdin is a pipe that its parent holds and never writes to.
When the parent ends, however it does, the system closes the pipe, and this process kills itself: a sweep that goes on
must not meet runs of the one that was killed.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading


def _end_with_parent(descriptor: int) -> None:
    """Wait for the end of the pipe, then kill this process: what it has written whole is a checkpoint to go on from."""
    while os.read(descriptor, 64):
        pass
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Watch stdin, then be the module that the arguments name."""
    pipe = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    threading.Thread(target=_end_with_parent, args=(pipe,), name="parent", daemon=True).start()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
