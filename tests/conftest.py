"""What the tests share: a tiny model, and the program run as a user runs it."""

from __future__ import annotations

import gc
import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from environment import ROOT, RunProgram
from fork_server import ADDRESS, TESTED_WITH, ForkServer, Server, forked_python
from hypothesis import settings

if TYPE_CHECKING:  # torch is not imported here: the process that only hands out the tests would wait for it too
    from lit_gpt.model.config import GPTConfig
    from lit_gpt.model.gpt import GPT

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several workers share the cores: a second thread in each would wait for the others' (20 times slower was seen).
    os.environ["OMP_NUM_THREADS"] = "1"  # of the programs that tests start
    import torch

    torch.set_num_threads(1)
# A slow machine is not a wrong result. Every run tries new examples; in CI, where a change is judged, the same ones.
settings.register_profile("lit_gpt", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("lit_gpt")


def pytest_configure(config: pytest.Config) -> None:
    """Start the fork server that all workers share, and have them forked from it: their imports cost as much as a
    hundred tests."""
    if "PYTEST_XDIST_WORKER" not in os.environ and config.getoption("numprocesses", None):
        server = Server(*TESTED_WITH)
        os.environ[ADDRESS] = server.address
        config.add_cleanup(server.close)
        config.option.tx = [f"popen//python={shlex.join(forked_python(server.address))}"] * config.option.numprocesses


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core, and one more where slow tests run: those wait for processes, and for limits of time."""
    return len(os.sched_getaffinity(0)) + (not config.option.markexpr)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is collected stays: the search for cycles of dead objects waits, and leaves it out."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `kernels` skip, saying why, where there are none."""
    marked = [item for item in items if "kernels" in item.keywords]
    if not marked:
        return
    from lit_gpt.inference import native

    if native.load() is None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=f"kernels: {native.status()}"))


@pytest.fixture
def tiny_config() -> GPTConfig:
    import models

    return models.tiny_config()


@pytest.fixture
def tiny_model() -> GPT:
    import models
    import torch

    return models.tiny_gpt(std=None, dtype=torch.float32)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts Python processes in milliseconds."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture
def program(tmp_path: Path, fork_server: ForkServer) -> RunProgram:
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
        return fork_server.run("-m", "lit_gpt", *arguments, cwd=cwd, env=env, timeout=timeout)

    return run
