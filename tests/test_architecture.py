"""Imports run one way: the contracts in pyproject.toml hold."""

from __future__ import annotations

import subprocess
from pathlib import Path

from environment import ROOT


def test_import_contracts_hold(tmp_path: Path) -> None:
    command = ["lint-imports", "--config", str(ROOT / "pyproject.toml"), "--cache-dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
