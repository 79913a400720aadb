"""`python on_terminal.py TERMINAL lit_gpt ARGUMENTS` in a new session: the program, with that terminal as its own."""

from __future__ import annotations

import os
import runpy
import sys

if __name__ == "__main__":
    # The first terminal that the leader of a session opens is the session's: Ctrl-C there is a signal here.
    terminal = os.open(sys.argv[1], os.O_RDWR)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
