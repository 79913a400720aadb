"""What the tests share: a tiny model, and the program run as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import models
import pytest
import torch
from environment import ROOT, RunProgram
from hypothesis import settings

from lit_gpt.inference import native
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores: a second thread in each would wait for the others' (20 times slower was seen).
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    torch.set_num_threads(1)
# A slow machine is not a wrong result. Every run tries new examples; in CI, where a change is judged, the same ones.
settings.register_profile("lit_gpt", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lit_gpt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `kernels` skip, saying why, where there are none."""
    marked = [item for item in items if "kernels" in item.keywords]
    if marked and native.load() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"kernels: {native.status()}"))


@pytest.fixture
def tiny_config() -> GPTConfig:
    return models.tiny_config()


@pytest.fixture
def tiny_model() -> GPT:
    return models.tiny_gpt(std=None, dtype=torch.float32)


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
