"""The ranks that Lightning starts as processes of their own from the first one of a node: watched, ended and reaped.

Lightning's own observer kills all with SIGKILL, the parent first of all, five seconds after one of them has failed: no
line says why, and what rank 0 could still save is lost. It can go when Lightning's observer can be told what to do.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.strategies.launchers import subprocess_script

LINE_SECONDS = 3.0
"""For a process to say why it ends."""
_children: list[subprocess.Popen[bytes]] = []
_on_failure: Callable[[int, str], None] | None = None


def watch_children(on_failure: Callable[[int, str], None]) -> None:
    """Replace Lightning's observer for children that are started from here on or that are there already.

    Args:
        on_failure: called in a thread of its own with the index of the first child that fails, and how it ended.
    """
    global _on_failure
    _on_failure = on_failure
    subprocess_script._launch_process_observer = _observe  # type: ignore[assignment]
    for thread in threading.enumerate():
        if isinstance(thread, _ChildProcessObserver) and thread._child_processes:
            children, thread._child_processes = thread._child_processes, []  # it then finds nothing left to do
            _observe(children)


def _observe(children: list[subprocess.Popen[bytes]]) -> None:
    _children[:] = children
    threading.Thread(target=_poll, name="lit_gpt children", daemon=True).start()


def _poll() -> None:
    while True:
        is_over = all(child.poll() is not None for child in _children)
        for index, child in enumerate(_children):
            if child.returncode and _on_failure is not None:
                _on_failure(index, describe_end(child.returncode))
                return
        if is_over:
            return
        time.sleep(0.25)


def describe_end(status: int) -> str:
    """How a process ended, from its `returncode`."""
    if status >= 0:
        return f"ended with status {status}"
    reason = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{reason}"


def kill_child(index: int) -> None:
    """Kill a child that does not answer, if this process has one of this index."""
    if 0 <= index < len(_children) and _children[index].poll() is None:
        _children[index].kill()


def end_children(seconds: float = 10.0) -> None:
    """Wait a while for the children, kill those that are left, and reap all: no process of the run stays behind."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(child.poll() is None for child in _children):
        time.sleep(0.05)
    for child in _children:
        if child.poll() is None:
            child.kill()
    for child in _children:
        child.wait()


def end_process(rank: int, cause: str) -> None:
    """End this process from another thread than the main one, which waits in code that nothing interrupts."""
    line = f"\nlit_gpt: failed: {cause}; rank {rank} ends. To go on from the last checkpoint: --ckpt_path last\n"
    os.write(sys.__stderr__.fileno() if sys.__stderr__ is not None else 2, line.encode())
    end_children(LINE_SECONDS)
    os._exit(1)
