"""Tokenizing processes: what they may import, and from where."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from environment import ROOT
from preparing import write

from lit_gpt.data.workers import START, Workers
from lit_gpt.tokenizer.tokenizer import get_tokenizer

PLANTED = "open('executed', 'w').close()\nraise SystemExit('code of the corpus was run')\n"
MODULES = ("numpy", "pickle", "tiktoken", "sitecustomize", "lit_gpt")
TOKENIZE = """
import os, sys
from lit_gpt.data.workers import START, Workers
from lit_gpt.tokenizer.tokenizer import get_tokenizer
tokenizer = get_tokenizer("byte")
sys.path.insert(0, "")  # as in an interactive session, whose current folder is now that of a corpus
os.chdir(sys.argv[1])
with Workers(tokenizer, "uint16", 2) as workers:
    assert [len(result["train"].tokens) for result in workers.map([[("ab", True, "train")]] * 3)] == [3, 3, 3]
"""


def plant(folder: Path) -> Path:
    for name in MODULES:
        write(folder / f"{name}.py", PLANTED)
    return folder


@pytest.mark.slow
def test_no_code_of_the_current_folder_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A numpy.py in a downloaded corpus was executed: `python -c` puts the current folder first on the path."""
    monkeypatch.chdir(plant(tmp_path))
    with Workers(get_tokenizer("byte"), "uint16", 2) as workers:
        results = [result["train"].tokens.tolist() for result in workers.map([[("ab", True, "train")]] * 3)]
    assert results == [[97, 98, 256]] * 3
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_nor_where_the_callers_path_has_the_current_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-c", TOKENIZE, str(plant(tmp_path / "corpus"))]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "corpus/executed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["setup", "job"])
def test_a_caller_that_is_killed_in_the_middle_of_a_message_leaves_no_traceback(part: str) -> None:
    setup = pickle.dumps((get_tokenizer("byte"), "uint16"), protocol=5)
    job = pickle.dumps([("ab" * 1000, True, "train")], protocol=5)
    sent = setup[: len(setup) // 2] if part == "setup" else setup + job[: len(job) // 2]
    command = [sys.executable, "-P", "-c", START]
    done = subprocess.run(command, input=sent, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True)
    assert (done.returncode, done.stderr, done.stdout) == (0, b"", b"")
