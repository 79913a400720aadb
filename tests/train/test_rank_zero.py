"""Several ranks: one decision, one configuration, and an end on all of them, with one line, when one of them fails."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from environment import ROOT
from fork_server import ForkServer
from jsonargparse import Namespace

from lit_gpt.checkpoint.format import read_header
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.shards import write_shard
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.train import rank_zero
from lit_gpt.train.rank_watch import describe_end
from lit_gpt.train.ranks import device_count, find_ranks, starts_with_multiprocessing

HERE = Path(__file__).resolve().parent
DRIVER = HERE / "rank_driver.py"
KILLED = -signal.SIGKILL

Ended = list[tuple[int | None, str, str]]
"""Exit status, stdout and stderr of each rank; the status is None for one that had not ended after a minute."""


def environment() -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_", "NODE_"))}
    paths = os.pathsep.join(map(str, (ROOT, HERE, ROOT / "tests")))
    return env | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}


def drive(fork_server: ForkServer, folder: Path, *stages: dict[str, list[dict[str, Any]]]) -> dict[str, Ended]:
    done = fork_server.run(DRIVER, folder, json.dumps(stages), env=environment(), timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def problems(name: str, ended: Ended, expected: list[tuple[int, str]]) -> list[str]:
    """What of the status and of the line of each rank is not as expected."""
    found = []
    for rank, ((status, output, errors), (wanted, line)) in enumerate(zip(ended, expected, strict=True)):
        text = output + errors
        if status != wanted or line not in text or "frame #" in text or ("left: " in text and name != "stop"):
            found.append(f"{name}: rank {rank} has {status}, not {wanted} with {line!r}: {text[-1500:]}")
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    tokenizer, shards = get_tokenizer("byte"), []
    generator = np.random.default_rng(0)
    for name, count in [("train_000000.bin", 1000), ("val_000000.bin", 140)]:
        with write_shard(folder / name, "uint16") as writer:
            writer.add(generator.integers(0, 61, count))
        shards.append(writer.shard)
    tokenizer.save(folder / "tokenizer.json")
    ShardIndex("uint16", tuple(shards), "byte", tokenizer.hash, tokenizer.n_vocab).save(folder)
    return folder


def flags(data: Path, root: Path) -> list[str]:
    """A small run of the program."""
    options = {
        "data.path": data, "data.batch_size": 4, "model.config.block_size": 16, "model.config.n_layer": 1,
        "model.config.n_head": 2, "model.config.n_embd": 16, "model.compile": "false", "trainer.accelerator": "cpu",
        "trainer.precision": "32-true", "trainer.strategy": "ddp", "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": root, "samples.prompts": "[]", "trainer.check_val_every_n_epoch": "null",
        "trainer.val_check_interval": 3, "trainer.num_sanity_val_steps": 0,
    }  # fmt: skip
    return ["fit", *(f"--{name}={value}" for name, value in options.items())]


# Before there is a process group -------------------------------------------------------------------------------------

LIMITS = {"silence": 4.0, "line": 1.0, "arrival": 20.0}


def two(first: dict[str, Any], second: dict[str, Any] | None = None, **options: Any) -> list[dict[str, Any]]:
    """Two ranks that decide on `a`; the second one as the first if nothing is said."""
    ranks = (first, first if second is None else second)
    return [{"decide": {"names": ["a"], **rank}, "limits": LIMITS, **options} for rank in ranks]


@pytest.mark.slow
def test_two_nodes_by_lightning_decide_once_and_end_together(
    tmp_path: Path, data: Path, fork_server: ForkServer
) -> None:
    same, other = ({"names": [], "options": {"a": {"b": value}, "c": 2}, "then_sleep": 50} for value in (1, 3))

    def program(*steps: int) -> list[dict[str, Any]]:
        common = [*flags(data, tmp_path / str(steps)), "--trainer.num_nodes=2", "--trainer.devices=1"]
        return [{"program": [*common, f"--trainer.max_steps={count}"]} for count in steps]

    differing = "this rank's configuration is not rank 0's: a.b=3 where rank 0 has 1; start"
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        in_use = listener.getsockname()[1]
        patient = {"seconds": None}
        runs = {
            "agree": two({"names": ["a", "b"], "options": {"c": 1}, "group": True}),
            "long": two({"sleep": 6}, patient),
            "too long": two({"sleep": 50}, {"seconds": 2.0}),
            "kill": two({"sleep": 1, "fault": "kill"}, patient),
            "stop": two({"sleep": 1, "fault": "stop"}, patient),
            "bad input": two({"sleep": 1, "fault": "bad input"}, patient),
            "failure": two({"sleep": 1, "fault": "raise"}, patient),
            "other": two(same, other),
            "caller": two({"then_sleep": 5}, {"seconds": 0.0}, is_program=False),
            "program": program(2, 2),
            "other program": program(2, 3),
            "nobody": [{"absent": True}, {**two({})[1], "limits": {"arrival": 2.0}}],
            "port": [{**two({})[0], "port": in_use}],
        }
        ended = drive(fork_server, tmp_path, runs)
    agreed = '["a of node 0", "b of node 0"]\nthe end\nnothing left'
    expected = {
        "agree": [(0, agreed), (0, agreed)],
        "long": [(0, '["a of node 0"]'), (0, '["a of node 0"]')],
        "too long": [(1, "rank 1 failed: RankFailure"), (1, "rank 0 has not decided on a for 2 s")],
        "kill": [(KILLED, ""), (1, "rank 0 has ended; rank 1 ends")],
        "stop": [(KILLED, ""), (1, "rank 0 has not answered for 4 s; rank 1 ends")],
        "bad input": [(2, "this cannot be"), (2, "on rank 0: this cannot be")],
        "failure": [(1, "ValueError: a batch"), (1, "rank 0 failed: ValueError: a batch that cannot be read")],
        "other": [(2, f"on rank 1: {differing}"), (2, differing)],
        # The process of a caller is not ended, but its main thread hears of the failure when it comes to the end.
        "caller": [(1, "the end\nnothing left"), (1, "rank 0 has not decided on a")],
        "program": [(0, "")] * 2,
        "other program": [(2, "trainer.max_steps=3 where rank 0 has 2")] * 2,
        "nobody": [(0, ""), (1, "rank 0 did not answer at 127.0.0.2:")],
        "port": [(2, f"MASTER_PORT={in_use}: rank 0 cannot listen there")],
    }
    assert [text for name in runs for text in problems(name, ended[name], expected[name])] == []
    assert read_header(next((tmp_path / "(2, 2)").rglob("last.ckpt"))).step == 2


@pytest.mark.slow
def test_two_nodes_by_torchrun_on_two_loopback_addresses(tmp_path: Path, fork_server: ForkServer) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    asked = {"decide": {"names": ["a", "b"], "options": {"c": 1}, "group": True}}
    launch = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=1"]
    env = environment() | {"PYTHON_EXEC": str(fork_server.write_python(tmp_path / "python"))}
    nodes = [
        fork_server.start(
            "-m", "torch.distributed.run", *launch, f"--rdzv_endpoint=127.0.0.1:{port}",
            f"--local_addr=127.0.0.{node}", DRIVER, tmp_path, json.dumps(asked), env=env,
        )
        for node in (1, 2)
    ]  # fmt: skip
    ended = [node.finish(100) for node in nodes]
    assert [node.returncode for node in ended] == [0, 0], ended
    decided = [node.stdout.splitlines() for node in ended]
    assert [json.loads(lines[0]) for lines in decided] == [["a of node 0", "b of node 0"]] * 2


def test_nothing_is_left_in_the_process_of_a_caller() -> None:
    before = dict(os.environ)
    two_devices = Namespace(num_nodes=1, devices=2, accelerator="cpu", strategy="ddp")
    for error in (None, UserError("bad"), KeyboardInterrupt()):
        try:
            with rank_zero.failures_reported():
                rank_zero.connect_ranks(two_devices)
                assert os.environ["MASTER_PORT"] and rank_zero.decide_once("a", lambda: "here") == "here"
                if error is not None:
                    raise error
        except (UserError, KeyboardInterrupt) as raised:
            assert raised is error
        assert dict(os.environ) == before
        assert rank_zero.current_watch() is None
        assert [thread for thread in threading.enumerate() if thread.name == "lit_gpt ranks"] == []


def test_one_process_has_no_store_and_no_thread() -> None:
    with rank_zero.failures_reported():
        rank_zero.connect_ranks(Namespace(num_nodes=1, devices=1, accelerator="cpu", strategy="auto"))
        assert rank_zero.current_watch() is None and rank_zero.is_rank_zero()


def test_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def found(**options: Any) -> Any:
        return find_ranks(Namespace(**{"num_nodes": 1, "accelerator": "cpu", "strategy": "ddp", **options}))

    assert found(devices=1) is None
    assert found(devices=2, strategy="ddp_spawn") is None  # which decides before it starts the others
    alone = found(devices=2)
    assert (alone.rank, alone.world_size, alone.port) == (0, 2, 0)
    with pytest.raises(UserError, match="set MASTER_ADDR, MASTER_PORT and NODE_RANK on every node"):
        found(devices=2, num_nodes=2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = found(devices=2, num_nodes=2)
    assert (second.rank, second.world_size, second.address, second.port) == (3, 4, "10.0.0.1", 1234)
    monkeypatch.setenv("MASTER_PORT", "70000")
    with pytest.raises(UserError, match="MASTER_PORT=70000"):
        found(devices=2, num_nodes=2)


def test_strategies_that_start_ranks_after_the_decisions() -> None:
    assert starts_with_multiprocessing("ddp_fork_find_unused_parameters_true")
    assert not starts_with_multiprocessing("ddp") and not starts_with_multiprocessing(None)
    spawn = Namespace(class_path="lightning.pytorch.strategies.DDPStrategy", init_args=Namespace(start_method="spawn"))
    assert starts_with_multiprocessing(spawn)


@pytest.mark.parametrize(("devices", "count"), [(2, 2), ("3", 3), ([0, 2], 2), ("0,2,", 2), ("auto", 1), (-1, 1)])
def test_devices_of_a_node(devices: int | str | list[int], count: int) -> None:
    assert device_count(devices, "cpu") == count


def test_how_a_process_ended() -> None:
    assert describe_end(3) == "ended with status 3"
    assert describe_end(KILLED) == "was ended by SIGKILL, as when memory runs out"


# Training ------------------------------------------------------------------------------------------------------------


FAULTS = {
    # Rank 0 saves what it has, by itself, unless it is the one that is lost or waits for one that is only stopped.
    "raise 1": ([(1, "rank 1 failed: ValueError: a batch that cannot be read"), (1, "ValueError: a batch")], 5),
    "raise 0": ([(1, "ValueError: a batch"), (1, "rank 0 failed: ValueError: a batch that cannot be read")], 5),
    "kill 1": ([(1, "the connection to rank 1 was lost; rank 0 ends; go on from the last"), (KILLED, "")], 5),
    "kill 0": ([(KILLED, ""), (1, "rank 0 has ended; rank 1 ends; go on from the last")], 3),
    "stop 1": ([(1, "rank 1 has not answered for 4 s"), (KILLED, "")], 3),
    "hang 1": ([(1, "rank 1 has stood still for"), (1, "rank 1 has stood still for")], 5),
    "hang 0": ([(1, "rank 0 has stood still for"), (1, "rank 0 has stood still for")], 3),
}


@pytest.mark.slow
def test_all_ranks_end_and_the_run_resumes(tmp_path: Path, data: Path, fork_server: ForkServer) -> None:
    def run(name: str, **options: Any) -> list[dict[str, Any]]:
        asked = {"root": str(tmp_path / name), "data": str(data), **options}
        return [{"fit": asked, "limits": {**LIMITS, "saving": 5.0}}] * 2

    runs = {name: run(name, fault=[name.split()[0], int(name[-1])]) for name in FAULTS}
    runs["whole"] = run("whole", fault=["pause", 0, 3])  # a long pause after a validation is no failure
    more = {f"from {name}": run(f"from {name}", ckpt_path=str(tmp_path / name)) for name in ("kill 1", "kill 0")}
    ended = drive(fork_server, tmp_path, runs, more)
    expected = {name: lines for name, (lines, _) in FAULTS.items()}
    assert [
        text for name in ended for text in problems(name, ended[name], expected.get(name, [(0, "nothing left")] * 2))
    ] == []
    steps = {name: read_header(next((tmp_path / name).rglob("last.ckpt"))).step for name in FAULTS}
    assert steps == {name: step for name, (_, step) in FAULTS.items()}
    uninterrupted = torch.load(tmp_path / "whole" / "weights.pt")
    for name in more:
        weights = torch.load(tmp_path / name / "weights.pt")
        assert all(torch.equal(weights[key], value) for key, value in uninterrupted.items()), name


@pytest.mark.slow
def test_a_killed_rank_that_the_program_started(tmp_path: Path, data: Path, fork_server: ForkServer) -> None:
    """Lightning's own observer ended rank 0 with SIGKILL: no line said why, and what was made was lost."""
    fault = ["--trainer.callbacks+=rank_driver.Fault", "--trainer.callbacks.kind=kill", "--trainer.callbacks.rank=1"]
    words = (ROOT / "tests/program_driver.py", *flags(data, tmp_path), "--trainer.devices=2", *fault)
    env = environment() | {"LIT_GPT_TEST_PYTHON": str(fork_server.write_python(tmp_path / "python"))}
    process = fork_server.start(*words, env=env)
    try:
        done = process.finish(100)
        errors = done.stderr
        assert done.returncode == 1, errors
        assert processes_of(process.pid) == []
    finally:
        for pid in processes_of(process.pid):
            os.kill(pid, signal.SIGKILL)
    assert "rank 1 was ended by SIGKILL, as when memory runs out; rank 0 ends" in errors.splitlines()[-1]
    assert read_header(next(tmp_path.rglob("last.ckpt"))).step == 5


def processes_of(session: int) -> list[int]:
    """Processes of a session that have not been reaped, by /proc/PID/stat: state, parent, group, session."""
    stats = {path.parent.name: path.read_text().rsplit(")", 1)[1].split() for path in Path("/proc").glob("[0-9]*/stat")}
    return [int(pid) for pid, stat in stats.items() if int(stat[3]) == session]
