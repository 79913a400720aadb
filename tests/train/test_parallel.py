"""Several processes: DDP and FSDP2 on the CPU give what one process gives, and a scheduler's SIGTERM loses nothing."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from environment import ROOT
from fork_server import ForkServer
from parallel_run import main
from training import Batches

from lit_gpt.checkpoint.format import load_model, read_header

HERE = Path(__file__).resolve().parent


def start(fork_server: ForkServer, folder: Path, **asked: Any) -> subprocess.CompletedProcess[str]:
    """With Lightning's own launch, whose processes get the signal from rank 0."""
    folder.mkdir(exist_ok=True)
    python = fork_server.write_python(folder / "python")
    env = {
        "LIT_GPT_TEST_PYTHON": str(python),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE))),
        "OMP_NUM_THREADS": "1",
    }
    return fork_server.run(HERE / "parallel_run.py", folder, json.dumps(asked), env=env, timeout=200)


def run(fork_server: ForkServer, folder: Path, **asked: Any) -> dict[str, Any]:
    """Final figures and, under `train`, the losses and norms of every step. One process needs no other."""
    folder.mkdir(exist_ok=True)
    if "devices" in asked:
        for done in fork_server.run_ranks(asked["devices"], HERE / "parallel_run.py", folder, json.dumps(asked)):
            assert done.returncode == 0, done.stderr[-2000:]
    else:
        main(folder, asked)
    figures = json.loads((folder / "figures.json").read_text())
    with open(Path(figures["log_dir"]) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    figures["train"] = {(int(row["step"]), key): float(row[key]) for row in rows for key in row if key in TRAINED}
    return figures


TRAINED = ("train/loss", "train/gradient_norm")
FIGURES = ("val/loss", "val/perplexity", "val/bits_per_byte")


def assert_same(one: dict[str, Any], other: dict[str, Any], steps: int) -> None:
    assert len(one["train"]) == 2 * steps
    assert other["train"] == pytest.approx(one["train"], rel=1e-5)
    for name in FIGURES:
        assert other[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
def test_ddp_with_half_the_batch_each_equals_one_process(fork_server: ForkServer, tmp_path: Path) -> None:
    one = run(fork_server, tmp_path / "one")
    two = run(fork_server, tmp_path / "two", devices=2, strategy="ddp")
    assert_same(one, two, 6)


@pytest.mark.slow
def test_fsdp2_clips_saves_and_resumes_as_one_process(fork_server: ForkServer, tmp_path: Path) -> None:
    one = run(fork_server, tmp_path / "one", optimizer="muon")
    two = run(fork_server, tmp_path / "two", optimizer="muon", devices=2, strategy="fsdp2")
    assert two["train"].keys() == one["train"].keys()
    for (step, name), value in one["train"].items():
        # Products of shards round otherwise than those of the whole, and Muon makes much of small singular values.
        assert two["train"][step, name] == pytest.approx(value, rel=1e-5 if step == 1 else 2e-2)
    path = next((tmp_path / "two").rglob("last.ckpt"))
    model, tokenizer = load_model(path)
    assert tokenizer is not None
    nll = tokens = 0.0
    with torch.no_grad():
        for idx, targets in Batches(13, 4, seed=1):
            output = model(idx, targets)
            nll, tokens = nll + float(output.loss_sum), tokens + int(output.n_targets)
    assert tokens == 13 * 16
    assert nll / tokens == pytest.approx(two["val/loss"], rel=1e-5)
    more = run(
        fork_server, tmp_path / "more", optimizer="muon", devices=2, strategy="fsdp2", ckpt_path=str(path), max_steps=8
    )
    alone = run(fork_server, tmp_path / "alone", optimizer="muon", ckpt_path=str(path), max_steps=8)
    assert {step for step, _ in more["train"]} == {7, 8}
    assert more["train"][7, "train/loss"] == pytest.approx(alone["train"][7, "train/loss"], rel=1e-5)
    assert more["train"][8, "train/loss"] == pytest.approx(alone["train"][8, "train/loss"], rel=1e-3)


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_143(fork_server: ForkServer, tmp_path: Path) -> None:
    done = start(fork_server, tmp_path, sigterm=3, devices=2, strategy="ddp")
    assert done.returncode == 143, done.stderr[-2000:]
    header = read_header(next(tmp_path.rglob("last.ckpt")))
    assert header.step == 3
    assert not list(tmp_path.rglob("*.partial"))
    more = run(fork_server, tmp_path / "more", ckpt_path=str(header.path))  # what was saved can be gone on with
    assert max(step for step, _ in more["train"]) == 6
