"""Before there is a process group: one decision for all nodes, one configuration, and reports of failures."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from environment import ROOT
from jsonargparse import Namespace

from lit_gpt.errors import UserError
from lit_gpt.train.ranks import device_count, find_ranks, starts_with_multiprocessing

PROGRAM = Path(__file__).resolve().parent / "rank_zero_run.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(asked: dict[str, Any], launcher: list[str] | None = None, **environment: object) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_", "NODE_"))}
    env |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "LIT_GPT_RANK_TIMEOUT": "5",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    env |= {name: str(value) for name, value in environment.items()}
    return subprocess.Popen(
        [*(launcher or [sys.executable]), str(PROGRAM), json.dumps(asked)],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def nodes(*asked: dict[str, Any], address: str = "127.0.0.1", devices: int = 1) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of one process for each node, as a user would start them by hand."""
    port = free_port()
    processes = [
        start(
            {"num_nodes": len(asked), "devices": devices, **options},
            MASTER_ADDR=address, MASTER_PORT=port, NODE_RANK=index,
        )
        for index, options in enumerate(asked)
    ]  # fmt: skip
    return finish(processes)


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status and output of each. All are ended if one exceeds its time; a stopped first one ends after the others."""
    done = []
    try:
        for process in reversed(processes):
            if Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "T":
                process.kill()
            output, errors = process.communicate(timeout=100)
            done.append((process.returncode, output, errors))
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return done[::-1]


@pytest.mark.slow
def test_two_nodes_by_lightning_get_one_decision() -> None:
    first, second = nodes({"decide": ["a", "b"]}, {"decide": ["a", "b"]}, address="127.0.0.2")
    assert first[0] == second[0] == 0, (first, second)
    assert json.loads(first[1]) == json.loads(second[1]) == ["a of node 0", "b of node 0"]


@pytest.mark.slow
def test_a_long_decision_is_waited_for_while_rank_zero_lives() -> None:
    first, second = nodes({"decide": ["a"], "sleep": 12}, {"decide": ["a"], "seconds": None})
    assert (first[0], second[0]) == (0, 0), (first, second)


@pytest.mark.slow
def test_a_short_decision_has_a_limit() -> None:
    first, second = nodes({"decide": ["a"], "sleep": 60}, {"decide": ["a"], "seconds": 3})
    assert second[0] == 1
    assert "rank 0 has not decided on a for 3 s" in second[2]
    assert first[0] == 1  # it is not waited for until its own end
    assert "rank 1 failed: RankFailure" in first[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("end", "status", "line"),
    [
        ("kill", 1, "rank 0 has ended"),
        ("stop", 1, "rank 0 has not answered for 5 s"),
        ("bad input", 2, "on rank 0: this cannot be"),
        ("failure", 1, "rank 0 failed: no disk"),
    ],
)
def test_the_others_end_when_rank_zero_does(end: str, status: int, line: str) -> None:
    began = time.monotonic()
    _, second = nodes({"decide": ["a"], "sleep": 1, "end": end}, {"decide": ["a"], "seconds": None})
    assert second[0] == status, second
    assert line in second[2] and "Traceback" not in second[2] and "frame #" not in second[2]
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_nobody_there() -> None:
    ended = nodes({"end": "at once"}, {"arrival": 2})[1]
    assert ended[0] == 1
    assert "rank 0 did not answer at 127.0.0.1:" in ended[2]


@pytest.mark.slow
def test_a_port_in_use_is_one_line() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        port = listener.getsockname()[1]
        ((status, _, errors),) = finish([start({"num_nodes": 2}, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)])
    assert status == 2
    assert f"MASTER_PORT={port}" in errors.splitlines()[-1]


@pytest.mark.slow
def test_another_configuration_ends_all_ranks_with_the_keys() -> None:
    first, second = nodes({"options": {"a": {"b": 1}, "c": 2}}, {"options": {"a": {"b": 3}, "c": 2}})
    assert second[0] == 2
    assert "a.b=3 where rank 0 has 1" in second[2] and "c=" not in second[2]
    assert first[0] == 1
    assert "rank 1 failed: UserError: rank 1 has another configuration: a.b=3" in first[2]


@pytest.mark.slow
def test_two_nodes_by_torchrun_on_two_loopback_addresses() -> None:
    port = free_port()
    launchers = [
        [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d",
            "--rdzv_id=1", f"--rdzv_endpoint=127.0.0.1:{port}", f"--local_addr=127.0.0.{node}",
        ]
        for node in (1, 2)
    ]  # fmt: skip
    asked = {"decide": ["a", "b"], "options": {"c": 1}, "group": True}
    done = finish([start(asked, launcher) for launcher in launchers])
    assert [status for status, _, _ in done] == [0, 0], done
    assert [json.loads(output) for _, output, _ in done] == [["a of node 0", "b of node 0"]] * 2


def test_who_is_who(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def found(**options: Any) -> Any:
        return find_ranks(Namespace(**{"num_nodes": 1, "accelerator": "cpu", "strategy": "ddp", **options}))

    assert found(devices=1) is None
    assert found(devices=2, strategy="ddp_spawn") is None  # which decides before it starts the others
    alone = found(devices=2)
    assert (alone.rank, alone.world_size, alone.port, alone.hosts) == (0, 2, 0, True)
    with pytest.raises(UserError, match="MASTER_ADDR and MASTER_PORT not set"):
        found(devices=2, num_nodes=2)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    monkeypatch.setenv("NODE_RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    second = found(devices=2, num_nodes=2)
    assert (second.rank, second.world_size, second.address, second.hosts) == (3, 4, "10.0.0.1", False)


def test_strategies_that_start_ranks_after_the_decisions() -> None:
    assert starts_with_multiprocessing("ddp_fork_find_unused_parameters_true")
    assert not starts_with_multiprocessing("ddp") and not starts_with_multiprocessing(None)
    spawn = Namespace(class_path="lightning.pytorch.strategies.DDPStrategy", init_args=Namespace(start_method="spawn"))
    assert starts_with_multiprocessing(spawn)


@pytest.mark.parametrize(("devices", "count"), [(2, 2), ("3", 3), ([0, 2], 2), ("0,2,", 2), ("auto", 1), (-1, 1)])
def test_devices_of_a_node(devices: int | str | list[int], count: int) -> None:
    assert device_count(devices, "cpu") == count
