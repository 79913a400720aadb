"""Where the tests run: the checkout, what may stand beside it, and the program as a user runs it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
FIXTURES = ROOT / "tests/fixtures"
RunProgram = Callable[..., "subprocess.CompletedProcess[str]"]
