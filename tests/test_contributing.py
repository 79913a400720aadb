"""The how-tos of CONTRIBUTING.md, followed to the letter on a copy of the package."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from environment import ROOT
from fork_server import ForkServer

TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
HOW_TOS = {section.split("\n", 1)[0]: section for section in re.split(r"^## ", TEXT, flags=re.MULTILINE)[2:]}
SHOWN = {
    "Add a decoding strategy": "First Citizen:",
    "Add an activation": "torch.Size([1, 3, 50])",
    "Add a Hugging Face architecture": "the same logits",
    "Add a text reader": "document 2: ",
}


def apply(block: str, root: Path) -> None:
    """Write the new file, or change the one file, that a block describes."""
    head, *lines = block.splitlines()
    mark, name = head.split(maxsplit=1)
    path = root / name
    if mark == "+++":
        assert not path.exists() and all(line.startswith("+") for line in lines)
        path.write_text("".join(f"{line[1:]}\n" for line in lines), "utf-8")
        return
    before = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    after = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = path.read_text("utf-8")
    assert text.count(before) == 1, f"{name} has not exactly once:\n{before}"
    path.write_text(text.replace(before, after), "utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("title", HOW_TOS)
def test_each_how_to_works_as_written(title: str, tmp_path: Path, fork_server: ForkServer) -> None:
    shutil.copytree(ROOT / "lit_gpt", tmp_path / "lit_gpt")  # with what is compiled already
    (tmp_path / "tests/fixtures").mkdir(parents=True)
    shutil.copy(ROOT / "tests/fixtures/modern.ckpt", tmp_path / "tests/fixtures")
    blocks = re.findall(r"```diff\n(.*?)```", HOW_TOS[title], flags=re.DOTALL)
    assert blocks
    for block in blocks:
        apply(block, tmp_path)
    (script,) = re.findall(r"```bash\n(.*?)```", HOW_TOS[title], flags=re.DOTALL)
    path = fork_server.write_commands(tmp_path / "bin")
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": path}
    done = subprocess.run(
        ["bash", "-e", "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert SHOWN[title] in done.stdout
    if title == "Add a decoding strategy":
        assert len(done.stdout.strip()) > len("First Citizen:")


def test_every_file_that_is_named_exists() -> None:
    named = re.findall(r"`((?:lit_gpt|tests|docs|\.ci)/[\w./-]*)`", TEXT)
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_what_ci_checks_beside_the_tests_is_the_pre_commit_configuration() -> None:
    script = (ROOT / ".ci/run").read_text("utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    assert "pre-commit run --all-files" in script
    assert all(f"entry: {tool}" in hooks for tool in ("ruff check", "ruff format --check", "mypy", "lint-imports"))
