"""The short form of scripts/torture.py loses nothing, and notices what is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from environment import ROOT
from fork_server import ForkServer

SCRIPT = ROOT / "scripts/torture.py"
SECTIONS = ("fit", "prepare", "results", "disk", "damage", "two", "kernels", "serve")

CARELESS = """
import runpy, sys
from contextlib import contextmanager
import lit_gpt.files.atomic

@contextmanager
def write_in_place(path, mode="wb"):
    with open(path, mode) as file:
        yield file

careful = lit_gpt.files.atomic.atomic_write
for module in list(sys.modules.values()):  # a forked process has imported it everywhere
    if vars(module).get("atomic_write") is careful:
        module.atomic_write = write_in_place
sys.argv = sys.argv[1:]
sys.path.insert(0, {scripts!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""The program with files that are written in their places."""


@pytest.mark.slow
def test_the_short_form_loses_nothing(tmp_path: Path, fork_server: ForkServer) -> None:
    done = fork_server.run(SCRIPT, "--short", env={**os.environ, "TMPDIR": str(tmp_path)}, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    head, rule, *lines, total = done.stdout.splitlines()
    assert (head, rule[:4]) == ("| section | tried | how many | lost or wrong | seconds |", "|---")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert tuple(dict.fromkeys(row[0] for row in cells)) == SECTIONS
    assert all(row[3] == "0" for row in cells) and total.startswith("| all |")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_half_an_output_is_noticed(tmp_path: Path, fork_server: ForkServer) -> None:
    careless, temporary = tmp_path / "careless.py", tmp_path / "temporary"
    careless.write_text(CARELESS.format(scripts=str(SCRIPT.parent)))
    temporary.mkdir()
    kill_in_the_middle_of_a_checkpoint = ("results", "--trial", "4")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    done = fork_server.run(careless, SCRIPT, *kill_in_the_middle_of_a_checkpoint, "--short", env=env, timeout=400)
    assert done.returncode == 1
    assert "half an output" in done.stderr
    assert "python scripts/torture.py SECTION --seed 0 --trial N --short" in done.stderr
