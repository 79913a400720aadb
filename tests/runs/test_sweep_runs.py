"""Sweeps of real, tiny runs: killed, failing, searched for."""

from __future__ import annotations

import json
import os
import signal
import string
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from environment import ROOT
from fork_server import Child, ForkServer

SETTINGS = """
model: {preset: nano, config: {n_layer: 1, n_head: 2, n_embd: 16, block_size: 16}, schedule: {warmup: 0}}
data: {batch_size: 8, source: text.py, path: tokens, tokenizer: byte, val_split: "tail:0.1"}
trainer:
  accelerator: cpu
  precision: 32-true
  val_check_interval: 4
  check_val_every_n_epoch: null
  num_sanity_val_steps: 0
  limit_val_batches: 2
samples: {prompts: []}
"""
LIMIT = 120.0  # seconds for what takes a few

StartSweep = Callable[..., Child]


@pytest.fixture
def start_sweep(tmp_path: Path, fork_server: ForkServer) -> StartSweep:
    """`start_sweep("--set", …)` starts `lit_gpt sweep --config base.yaml --set …` in `tmp_path`."""
    (tmp_path / "text.py").write_text(Path(str(string.__file__)).read_text("utf-8"), "utf-8")
    (tmp_path / "base.yaml").write_text(SETTINGS)
    python = fork_server.write_python(tmp_path / "python")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["LIT_GPT_TEST_PYTHON"] = str(python)

    def start(*words: object) -> Child:
        asked = ("sweep", "--config", "base.yaml", *words)
        return fork_server.start(ROOT / "tests/program_driver.py", *asked, cwd=tmp_path, env=env)

    return start


CHECKPOINTS = "lightning_logs/version_0/checkpoints/last.ckpt"


def is_far(output: Path, marks: int, amid_a_run: bool) -> bool:
    """Whether a sweep has so many checkpoints and ended runs, and a run that has the one and not the other."""
    begun, ended = (
        {path for path in output.glob("runs/*") if (path / n).exists()} for n in (CHECKPOINTS, "status.json")
    )
    return len(begun) + len(ended) >= marks and (not amid_a_run or bool(begun - ended))


def said(sweep: Child) -> str:
    """What a sweep has written to stderr; nothing before it has begun."""
    try:
        return sweep.output()[1]
    except FileNotFoundError:
        return ""


@pytest.mark.slow
def test_a_grid_that_is_killed_five_times_gives_the_table_of_one_that_was_not(
    tmp_path: Path, start_sweep: StartSweep
) -> None:
    grid = ["--set", "samples.held_out=0,-1", "--seeds", 3, "--budget", "steps:12", "--jobs", 2, "--output"]
    undisturbed = start_sweep(*grid, "whole").finish(LIMIT)
    assert undisturbed.returncode == 0, undisturbed.stderr
    rows = [line.split() for line in undisturbed.stdout.splitlines()]
    assert [row[-1] for row in rows[1:4]] == ["finished"] * 3
    failed = [line for line in undisturbed.stdout.splitlines() if "failed: samples.held_out=-1 must not be" in line]
    assert len(failed) == 3, "what fails is a line of the table and not the end"
    assert {row[2] for row in rows[1:4]} == {"1337", "1338", "1339"}

    output = tmp_path / "killed"
    amid = [(1, True, signal.SIGTERM), (1, True, signal.SIGKILL), (3, True, signal.SIGKILL), (5, True, signal.SIGKILL)]
    for number, amid_a_run, stop in (*amid, (6, False, signal.SIGKILL)):
        sweep = start_sweep(*grid, "killed")
        deadline = time.monotonic() + LIMIT
        while not (is_far(output, number, amid_a_run) and "): " in said(sweep)) and time.monotonic() < deadline:
            assert sweep.poll() is None, said(sweep)
            time.sleep(0.02)
        assert sweep.poll() is None, "it was to be killed before its end"
        os.kill(sweep.pid, stop)
        assert sweep.wait() == (143 if stop == signal.SIGTERM else -stop)
        assert ("the same command goes on with the sweep" in said(sweep)) == (stop == signal.SIGTERM)
    ended = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/status.json")}
    finished = start_sweep(*grid, "killed").finish(LIMIT)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == undisturbed.stdout
    assert len(list(output.glob("runs/*/lightning_logs/version_*"))) == len(list(output.glob("runs/*"))) == 6
    logs = [path.read_text("utf-8") for path in output.glob("runs/*/lightning_logs/*/run.jsonl")]
    starts = [line for log in logs for line in log.splitlines() if '"start"' in line]
    assert any(json.loads(line)["step"] > 0 for line in starts), "a run goes on from its checkpoint"
    assert ended.items() <= {path: path.stat().st_mtime_ns for path in output.glob("runs/*/status.json")}.items()
    again = start_sweep(*grid, "killed", "--format", "json").finish(LIMIT)
    assert again.stderr.strip().splitlines() == ["sweep: killed goes on"], "nothing is left to do"
    states = [run["state"] for run in json.loads(again.stdout)["runs"]]
    assert sorted(states) == ["failed"] * 3 + ["finished"] * 3


@pytest.mark.slow
def test_bad_input_is_a_line_and_writes_nothing(tmp_path: Path, start_sweep: StartSweep) -> None:
    refused = start_sweep("--set", "model.optimizer.lrr=1e-3,2e-3").finish(LIMIT)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.strip().splitlines() == [
        'lit_gpt: error: unknown option "--model.optimizer.lrr": did you mean "--model.optimizer.lr"?'
    ]
    refused = start_sweep("--set", "model.config.n_head=2,3").finish(LIMIT)
    assert refused.returncode == 2
    assert "n_embd=16 is not divisible by n_head=3" in refused.stderr
    assert "(the run with model.config.n_head=3)" in refused.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.yaml", "python", "text.py"]


@pytest.mark.slow
def test_a_search_goes_on_to_more_draws_and_repeats_none(tmp_path: Path, start_sweep: StartSweep) -> None:
    pytest.importorskip("optuna")
    search = ["--set", "model.optimizer.lr=log:1e-4..1e-2", "--method", "search", "--budget", "tokens:1024"]
    first = start_sweep(*search, "--draws", 2, "--format", "json").finish(LIMIT)
    assert first.returncode == 0, first.stderr
    drawn = json.loads(first.stdout)["runs"]
    assert [run["state"] for run in drawn] == ["finished"] * 2
    assert drawn[0]["loss"] <= drawn[1]["loss"]
    config = yaml.safe_load((tmp_path / "sweeps/base/runs/0000/fit.yaml").read_text("utf-8"))
    assert config["trainer"]["max_steps"] == 8, "1024 tokens are 8 steps of 8 rows of 16"
    more = start_sweep(*search, "--draws", 3, "--format", "json").finish(LIMIT)
    assert more.returncode == 0, more.stderr
    runs = {run["number"]: run for run in json.loads(more.stdout)["runs"]}
    assert len(runs) == 3
    assert {run["number"]: run for run in drawn}.items() <= runs.items()
    assert len({run["values"]["model.optimizer.lr"] for run in runs.values()}) == 3


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import sys, time\nprint(sys.argv, flush=True)\ntime.sleep(60)\n")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path)))}
    command = [sys.executable, "-m", "lit_gpt.runs.child", "sleeper", "--a", "b"]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert child.stdin is not None and child.stdout is not None
    try:
        assert child.stdout.readline().decode().endswith("'--a', 'b']\n"), "it is the module that was named"
        child.stdin.close()  # as the system does when the parent is killed
        assert child.wait(20) == -9
    finally:
        child.kill()
        child.stdout.close()
