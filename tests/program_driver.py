"""The program, whose own processes another Python starts, `$LIT_GPT_TEST_PYTHON`: `program_driver.py fit …`."""

from __future__ import annotations

import os
import sys

from lit_gpt.__main__ import main

if __name__ == "__main__":
    sys.executable = os.environ["LIT_GPT_TEST_PYTHON"]
    sys.exit(main(sys.argv[1:]))
