"""`lit_gpt sweep` whose runs are started by another Python: `sweep_driver.py PYTHON sweep …`."""

from __future__ import annotations

import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.executable = sys.argv[1]
    sys.exit(main(sys.argv[2:]))
