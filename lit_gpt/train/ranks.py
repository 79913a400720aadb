"""The processes of one run before and beside their process group: who they are, and the store that they share.

There is one store for each run, and no port of its own: torchrun's store where torchrun started the ranks, else one
that rank 0 hosts on the master port, where PyTorch's process group finds it and uses it too.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import DistNetworkError, TCPStore

from lit_gpt.errors import UserError
from lit_gpt.train.precision import device_type


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
        store_owner: whose process has the store: "rank 0", or "torchrun".
    """

    rank: int
    world_size: int
    address: str
    port: int
    store_owner: str = "rank 0"

    def connect(self, seconds: float) -> TCPStore:
        """A connection to the store of this run, which rank 0 hosts where nobody else does.

        Args:
            seconds: how long to wait for it: nodes of a cluster do not start at the same time.

        Raises:
            UserError: if the port cannot be had.
            RankFailure: if nobody answers there in time.
        """
        hosts = self.rank == 0 and self.store_owner == "rank 0"
        if not hosts:  # first by ourselves: TCPStore writes a stack trace for each failed attempt
            self._wait_for_store(seconds)
        try:
            return TCPStore(
                self.address, self.port, None, hosts, timedelta(seconds=60), wait_for_workers=False, multi_tenant=hosts
            )
        except DistNetworkError as error:
            if not hosts:
                raise RankFailure(f"{self.store_owner} left while this rank connected to it") from error
            raise UserError(
                f"MASTER_ADDR={self.address} MASTER_PORT={self.port}: rank 0 cannot listen there; "
                f"choose an address of this machine and a port that is free"
            ) from error

    def _wait_for_store(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            try:
                return socket.create_connection((self.address, self.port), timeout=min(10.0, seconds)).close()
            except OSError as error:
                if time.monotonic() > deadline:
                    raise RankFailure(self.no_answer(seconds)) from error
            time.sleep(0.2)

    def no_answer(self, seconds: float) -> str:
        """The line about a store that is not there."""
        return (
            f"{self.store_owner} did not answer at {self.address}:{self.port} for {seconds:.0f} s: start it, or "
            f"correct MASTER_ADDR and MASTER_PORT"
        )


# Who is who ----------------------------------------------------------------------------------------------------------


def find_ranks(trainer: Namespace) -> Ranks | None:
    """This process among those of the run that the Trainer's options ask for; None for a run of one process.

    Raises:
        UserError: if the run has several nodes that cannot know of each other.
    """
    found: Ranks | None = None
    if TorchElasticEnvironment.detect():
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        found = _external(TorchElasticEnvironment(), "torchrun" if agent else "rank 0")
    elif SLURMEnvironment.detect():
        found = _external(SLURMEnvironment(), "rank 0")
    elif not starts_with_multiprocessing(trainer.get("strategy")):
        found = _launched_by_lightning(trainer)
    return found if found is not None and found.world_size > 1 else None


def _external(environment: TorchElasticEnvironment | SLURMEnvironment, store_owner: str) -> Ranks:
    address, port = environment.main_address, environment.main_port
    return Ranks(environment.global_rank(), environment.world_size(), address, port, store_owner)


def _launched_by_lightning(trainer: Namespace) -> Ranks:
    """Lightning starts the ranks of a node from its first process, which has no LOCAL_RANK yet."""
    nodes, local = max(1, int(trainer.num_nodes)), os.environ.get("LOCAL_RANK")
    node = int(os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")))
    devices = device_count(trainer.devices, trainer.accelerator)
    rank, world_size = node * devices + int(local or 0), nodes * devices
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    is_known = bool(address and port) or (nodes == 1 and local is None)
    if world_size > 1 and not (is_known and (port or "0").isdecimal() and int(port or 0) < 2**16):
        raise UserError(
            f"trainer.num_nodes={nodes} MASTER_ADDR={address} MASTER_PORT={port}: set MASTER_ADDR, MASTER_PORT and "
            f"NODE_RANK on every node, or start the ranks with torchrun"
        )
    return Ranks(rank, world_size, address or "127.0.0.1", int(port or 0) if world_size > 1 else 0)


def is_launched() -> bool:
    """Whether something has started this process as one rank of a run, so that it is there for that alone."""
    return "LOCAL_RANK" in os.environ or TorchElasticEnvironment.detect() or SLURMEnvironment.detect()


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
