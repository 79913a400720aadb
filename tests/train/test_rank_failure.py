"""One rank fails, ends, stops or hangs: all end within a minute, each with one line, and the run resumes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from environment import ROOT

from lit_gpt.checkpoint.format import read_header
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.shards import write_shard
from lit_gpt.tokenizer.tokenizer import get_tokenizer

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    tokenizer, shards = get_tokenizer("byte"), []
    generator = np.random.default_rng(0)
    for name, count in [("train_000000.bin", 1000), ("val_000000.bin", 140)]:
        with write_shard(folder / name, "uint16") as writer:
            writer.add(generator.integers(0, 61, count))
        shards.append(writer.shard)
    tokenizer.save(folder / "tokenizer.json")
    ShardIndex("uint16", tuple(shards), "byte", tokenizer.hash, tokenizer.n_vocab).save(folder)
    return folder


def start(root: Path, data: Path, launcher: list[str] | None = None, **asked: Any) -> subprocess.Popen[str]:
    root.mkdir(exist_ok=True)
    paths = os.pathsep.join(map(str, (ROOT, HERE, ROOT / "tests")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "LIT_GPT_RANK_TIMEOUT": "5"}
    arguments = [str(HERE / "rank_run.py"), json.dumps({"root": str(root), "data": str(data), **asked})]
    command = [*(launcher or [sys.executable]), *arguments]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    """What all ranks have written to stderr. None of them may be left."""
    try:
        errors = process.communicate(timeout=110)[1]
        assert processes_left(process.pid) == []
        return errors
    except subprocess.TimeoutExpired:
        pytest.fail("a rank has not ended")
    finally:
        _kill_group(process.pid)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return


def processes_left(group: int) -> list[str]:
    """Processes of a run that have not ended, by /proc/PID/stat: number, name, state, parent, group."""
    stats = [path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat")]
    return [" ".join(stat[:3]) for stat in stats if int(stat[2]) == group and stat[0] != "Z"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    root = tmp_path_factory.mktemp("whole")
    process = start(root, data, fault="slow validation", rank=0, step=3)
    errors = finish(process)
    assert process.returncode == 0, errors[-3000:]
    return root


def test_a_long_pause_after_the_validation_is_no_failure(whole: Path) -> None:
    assert (whole / "weights.pt").exists()


@pytest.mark.parametrize(
    ("fault", "rank", "line", "step"),
    [
        # Rank 0 saves what it has, by itself, unless it is the one that is lost.
        ("raise", 1, "rank 1 failed: ValueError: a batch that cannot be read", 5),
        ("raise", 0, "rank 0 failed: ValueError: a batch that cannot be read", 5),
        ("kill", 1, "rank 1 was ended by SIGKILL", 5),
        ("kill", 0, "rank 0 has ended", 3),
        ("stop", 1, "rank 1 has not answered for 5 s", 5),
        ("hang", 1, "rank 1 has stood still for", 5),
        ("hang", 0, "rank 0 has stood still for", 3),
    ],
)
def test_all_ranks_end_and_the_run_resumes(
    tmp_path: Path, data: Path, whole: Path, fault: str, rank: int, line: str, step: int
) -> None:
    process = start(tmp_path, data, fault=fault, rank=rank)
    errors = finish(process)
    assert process.returncode == (-signal.SIGKILL if (fault, rank) == ("kill", 0) else 1), errors[-3000:]
    assert line in errors, errors[-3000:]
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    assert read_header(checkpoint).step == step
    if fault != "kill":  # one run from each kind of checkpoint is enough
        return
    more = start(tmp_path / "more", data, ckpt_path=str(checkpoint))
    errors = finish(more)
    assert more.returncode == 0, errors[-3000:]
    resumed, uninterrupted = (torch.load(root / "weights.pt") for root in (tmp_path / "more", whole))
    for name, value in uninterrupted.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(("steps", "statuses"), [((2, 2), [0, 0]), ((2, 3), [1, 2])])
def test_two_nodes_by_the_program(tmp_path: Path, data: Path, steps: tuple[int, int], statuses: list[int]) -> None:
    """The nodes that Lightning's own launch starts: the same arguments are a run, others are refused on both."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    common = {
        "data.path": data, "data.batch_size": 4, "model.config.block_size": 16, "model.config.n_layer": 1,
        "model.config.n_head": 2, "model.config.n_embd": 16, "model.compile": "false", "trainer.accelerator": "cpu",
        "trainer.precision": "32-true", "trainer.strategy": "ddp", "trainer.num_nodes": 2, "trainer.devices": 1,
        "trainer.limit_val_batches": 0, "trainer.default_root_dir": tmp_path, "samples.prompts": "[]",
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in common.items()]
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "lit_gpt", "fit", *flags, f"--trainer.max_steps={count}"],
            env={**env, "MASTER_PORT": str(port), "NODE_RANK": str(node)},
            stderr=subprocess.PIPE, text=True, start_new_session=True,
        )
        for node, count in enumerate(steps)
    ]  # fmt: skip
    errors = [finish(process) for process in nodes]
    assert [process.returncode for process in nodes] == statuses, errors
    if steps[0] != steps[1]:
        assert all("trainer.max_steps=3 where rank 0 has 2" in text for text in errors)
