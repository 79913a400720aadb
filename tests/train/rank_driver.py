"""Ranks forked from a process that has imported torch and Lightning once: `python rank_driver.py FOLDER [{…}, …]`.

The list is of stages, one after the other; each has a name → a list of what each rank of a run does (see `rank`). A
rank is a node of its own on this machine, as Lightning's launch of several nodes starts them. Prints name → [exit
status, stdout, stderr] of each rank. What is no list is one rank, in this process.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from training import TINY

from lit_gpt.__main__ import main as program
from lit_gpt.checkpoint.lightning_io import AtomicCheckpointIO
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.errors import UserError
from lit_gpt.train.callbacks.defaults import default_callbacks
from lit_gpt.train.module import LitGPT
from lit_gpt.train.rank_watch import RankLimits
from lit_gpt.train.rank_zero import (
    check_same_configuration,
    connect_ranks,
    current_watch,
    decide_once,
    failures_reported,
)

TRAINER = {"num_nodes": 2, "devices": 1, "accelerator": "cpu", "strategy": "ddp"}


def fail(kind: str) -> None:
    match kind:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            time.sleep(600)
        case "bad input":
            raise UserError("this cannot be")
        case "raise":
            raise ValueError("a batch that cannot be read")


class Fault(Callback):
    """Fails on one rank at one step, or pauses there after a validation."""

    def __init__(self, kind: str, rank: int, step: int = 5) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            fail(self.kind)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.kind == "pause" and (trainer.global_rank, trainer.global_step) == (self.rank, self.step):
            time.sleep(6)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / "weights.pt")


def fit(root: str, data: str, fault: list[Any] | None = None, ckpt_path: str | None = None) -> None:
    """A short run; `ckpt_path` is a folder, of whose last checkpoint it goes on."""
    connect_ranks(Namespace(**TRAINER))
    last = None if ckpt_path is None else next(Path(ckpt_path).rglob("last.ckpt"))
    L.seed_everything(5, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        num_nodes=2,
        strategy=DDPStrategy(find_unused_parameters=True),  # buckets that are not rebuilt: the same bits after a resume
        max_steps=8,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Fault(*fault or ("", 0)), *default_callbacks()],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(LitGPT(TINY), TokenDataModule(data, batch_size=4, block_size=16), ckpt_path=last)


def decide(
    names: list[str],
    options: dict[str, Any] | None = None,
    sleep: float = 0.0,
    fault: str = "",
    seconds: float | None = 60.0,
    then_sleep: float = 0.0,
    group: bool = False,
) -> None:
    """Prints the decisions, and at the end that it has come to it."""

    def decision(name: str) -> str:
        time.sleep(sleep)
        fail(fault)
        return f"{name} of node {os.environ.get('NODE_RANK') or os.environ.get('GROUP_RANK')}"

    connect_ranks(Namespace(**TRAINER))
    if options is not None:
        check_same_configuration("options", options)
    print(json.dumps([decide_once(name, lambda name=name: decision(name), seconds) for name in names]))  # type: ignore
    if group:
        watch = current_watch()
        assert watch is not None
        torch.distributed.init_process_group("gloo", rank=watch.ranks.rank, world_size=watch.ranks.world_size)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    time.sleep(then_sleep)  # as a collective that waits for another rank
    print("the end")


def rank(asked: dict[str, Any]) -> int:
    """What one rank does, its exit status: `program` with arguments, else `fit` or `decide` with options.

    Args:
        asked: what to do with its arguments, `limits`, and whether it `is_program`, which it is if nothing is said;
            nothing at all if it is `absent`.
    """
    if "absent" in asked:
        return 0
    if "program" in asked:
        sys.argv = ["lit_gpt", *asked["program"]]
        return program()
    limits, environment = RankLimits(**asked.get("limits", {})), dict(os.environ)
    try:
        with failures_reported(asked.get("is_program", True), limits):
            fit(**asked["fit"]) if "fit" in asked else decide(**asked["decide"])
    except Exception as error:
        print(f"lit_gpt: {type(error).__name__}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    finally:
        launch = {name for name in os.environ.keys() | environment if name.startswith(("MASTER", "NODE", "LOCAL"))}
        left = [name for name in launch if os.environ.get(name) != environment.get(name)]
        left += [thread.name for thread in threading.enumerate() if thread.name == "lit_gpt ranks"]
        print(f"left: {left}" if left else "nothing left")
    return 0


# Forks ---------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fork(function: Callable[[], int], output: Path) -> int:
    """The id of a child that runs `function`, with stdout and stderr in files."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
        status = function()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(name: str, ranks: list[dict[str, Any]], folder: Path) -> list[int]:
    port = free_port()

    def run(index: int, asked: dict[str, Any]) -> int:
        os.environ |= {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": str(asked.get("port", port)), "NODE_RANK": str(index)}
        return rank(asked)

    return [
        fork(lambda index=index, asked=asked: run(index, asked), folder / f"{name}.{index}")  # type: ignore[misc]
        for index, asked in enumerate(ranks)
    ]


def finish(pids: list[int], seconds: float) -> dict[int, int | None]:
    """The exit status of each, None if it has not ended in time; those that are stopped end when the others have."""
    statuses: dict[int, int | None] = {}
    deadline = time.monotonic() + seconds
    while len(statuses) < len(pids):
        for pid in set(pids) - statuses.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        left = [pid for pid in pids if pid not in statuses]
        states = {Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] for pid in left}
        if left and (states == {"T"} or time.monotonic() > deadline):
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = -signal.SIGKILL if states == {"T"} else None
        time.sleep(0.05)
    return statuses


def main(folder: Path, stages: list[dict[str, list[dict[str, Any]]]]) -> None:
    results: dict[str, list[tuple[int | None, str, str]]] = {}
    for runs in stages:
        started = {name: start(name, ranks, folder) for name, ranks in runs.items()}
        statuses = finish([pid for pids in started.values() for pid in pids], 60)
        for name, pids in started.items():
            paths = [folder / f"{name}.{index}" for index in range(len(pids))]
            results[name] = [
                (statuses[pid], *(Path(f"{path}.{kind}").read_text() for kind in ("out", "err")))  # type: ignore[misc]
                for pid, path in zip(pids, paths)
            ]
    print(json.dumps(results))


if __name__ == "__main__":
    torch.set_num_threads(1)
    asked = json.loads(sys.argv[2])
    if isinstance(asked, dict):
        sys.exit(rank(asked))
    gc.collect()
    gc.freeze()  # what is shared with the ranks stays shared
    main(Path(sys.argv[1]), asked)
