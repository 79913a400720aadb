"""What the tests share: a tiny model, and the program run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from environment import ROOT, RunProgram
from hypothesis import settings

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

settings.register_profile("lit_gpt", deadline=None)  # a slow machine is not a wrong result
settings.load_profile("lit_gpt")


@pytest.fixture
def tiny_config() -> GPTConfig:
    return GPTConfig(vocab_size=257, block_size=32, n_layer=2, n_head=4, n_embd=32)


@pytest.fixture
def tiny_model(tiny_config: GPTConfig) -> GPT:
    torch.manual_seed(0)
    return GPT(tiny_config).eval()


@pytest.fixture
def program(tmp_path: Path) -> RunProgram:
    """`program("info", "--preset", "gpt2")` runs `lit_gpt info --preset gpt2` in an empty folder."""

    def run(
        *arguments: object, cwd: Path = tmp_path, timeout: float = 300, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            **environment,
        }
        command = [sys.executable, "-m", "lit_gpt", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)

    return run
