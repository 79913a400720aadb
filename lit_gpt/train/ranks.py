"""The processes of one run before and beside their process group: who they are, and the store that they share.

There is one store for each run, and no port of its own: torchrun's store where torchrun started the ranks, else one
that rank 0 hosts on the master port, where PyTorch's process group finds it and uses it too.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import DistNetworkError, PrefixStore, TCPStore

from lit_gpt.errors import UserError
from lit_gpt.train.precision import device_type
from lit_gpt.train.rank_children import end_process

ARRIVAL_SECONDS = 600.0
"""How long a rank waits for the store of rank 0: nodes of a cluster do not start at the same time."""


class RankFailure(RuntimeError):
    """Another rank of this run has failed, ended, or stopped answering."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run.

    Attributes:
        rank: global, from 0.
        world_size: processes of the run.
        address: of the store.
        port: of the store; 0 to host it on a free one.
        hosts: whether this process hosts the store: rank 0, except under torchrun.
    """

    rank: int
    world_size: int
    address: str
    port: int
    hosts: bool

    def connect(self) -> TCPStore:
        """A connection to the store of this run, hosting it where that is this process's part.

        Raises:
            UserError: if the port cannot be had.
            RankFailure: if nobody answers there for ARRIVAL_SECONDS.
        """
        line = f"rank 0 has not answered at {self.address}:{self.port} for {ARRIVAL_SECONDS:.0f} s"
        timer = threading.Timer(ARRIVAL_SECONDS, end_process, (self.rank, line))  # TCPStore waits for ever for a reply
        timer.daemon = True
        timer.start()
        try:
            return self._connect()
        finally:
            timer.cancel()

    def _connect(self) -> TCPStore:
        if not self.hosts:  # first by ourselves: TCPStore writes a stack trace for each failed attempt
            reach(self.address, self.port, ARRIVAL_SECONDS * 0.9).close()
        try:
            return TCPStore(
                self.address, self.port, None, self.hosts, timedelta(seconds=60),
                wait_for_workers=False, multi_tenant=self.hosts,
            )  # fmt: skip
        except DistNetworkError as error:
            if not self.hosts:
                raise RankFailure(f"rank 0 left while this rank connected to {self.address}:{self.port}") from error
            raise UserError(
                f"MASTER_ADDR={self.address} MASTER_PORT={self.port}: rank 0 cannot listen there; "
                f"choose an address of this machine and a port that is free"
            ) from error


def reach(address: str, port: int, seconds: float) -> socket.socket:
    """A plain connection to a store, tried again for so many seconds. Raises RankFailure."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((address, port), timeout=min(10.0, seconds))
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankFailure(
                    f"rank 0 did not answer at {address}:{port} for {seconds:.0f} s ({error}): start it, or correct "
                    f"MASTER_ADDR and MASTER_PORT"
                ) from error
        time.sleep(0.2)


def shared(store: TCPStore, use: int = 0) -> PrefixStore:
    """The part of the store that is ours; torchrun's outlives a restart of the ranks, so each start has its own."""
    return PrefixStore(f"lit_gpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{use}", store)


# Who is who ----------------------------------------------------------------------------------------------------------


def find_ranks(trainer: Namespace) -> Ranks | None:
    """This process among those of the run that the Trainer's options ask for; None for a run of one process.

    Raises:
        UserError: if the run has several nodes that cannot know of each other.
    """
    found: Ranks | None = None
    if TorchElasticEnvironment.detect():
        elastic = TorchElasticEnvironment()
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        found = _external(elastic, not agent)
    elif SLURMEnvironment.detect():
        found = _external(SLURMEnvironment(), True)
    elif not starts_with_multiprocessing(trainer.get("strategy")):
        found = _launched_by_lightning(trainer)
    return found if found is not None and found.world_size > 1 else None


def _external(environment: TorchElasticEnvironment | SLURMEnvironment, rank_zero_hosts: bool) -> Ranks:
    rank = environment.global_rank()
    address, port = environment.main_address, environment.main_port
    return Ranks(rank, environment.world_size(), address, port, rank_zero_hosts and rank == 0)


def _launched_by_lightning(trainer: Namespace) -> Ranks:
    """Lightning starts the ranks of a node from its first process, which has no LOCAL_RANK yet."""
    nodes, local, node = max(1, int(trainer.num_nodes)), os.environ.get("LOCAL_RANK"), int(_node_rank())
    devices = device_count(trainer.devices, trainer.accelerator)
    rank, world_size = node * devices + int(local or 0), nodes * devices
    if world_size > 1 and (nodes > 1 or local is not None):
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            raise UserError(
                f"trainer.num_nodes={nodes}, LOCAL_RANK={local}: {' and '.join(missing)} not set; set MASTER_ADDR, "
                f"MASTER_PORT and NODE_RANK on every node, or start the ranks with torchrun"
            )
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", 0))
    return Ranks(rank, world_size, address, port, rank == 0)


def _node_rank() -> str:
    return os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))


def device_count(devices: Any, accelerator: str) -> int:
    """Processes on one node, from the Trainer's `devices`: a number, a list of indices, either as text, or `auto`."""
    if isinstance(devices, str) and "," in devices:
        devices = [index for index in devices.split(",") if index.strip()]
    if isinstance(devices, list):
        return max(1, len(devices))
    if str(devices) in ("auto", "-1"):
        return max(1, torch.cuda.device_count()) if device_type(accelerator) == "cuda" else 1
    return max(1, int(devices)) if str(devices).isdecimal() else 1


def starts_with_multiprocessing(strategy: Any) -> bool:
    """Whether Lightning forks or spawns the ranks, once all is decided: `ddp_spawn`, `ddp_fork` and their like."""
    if isinstance(strategy, str):
        return any(word in strategy for word in ("spawn", "fork", "notebook"))
    options = (strategy.get("init_args") if isinstance(strategy, Namespace | dict) else None) or {}
    return (options.get("start_method") or "popen") != "popen"
