"""Decisions of rank 0 that all ranks share, before there is a process group."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import TCPStore

_TIMEOUT = timedelta(hours=24)  # rank 0 may be tokenising a large corpus
_calls = 0


def decide_once(name: str, decide: Callable[[], str]) -> str:
    """Run `decide` on rank 0 only and return its result on every rank.

    Ranks that torchrun or SLURM started meet in a store on the port after the process group's. Ranks that Lightning
    starts later inherit the value in an environment variable, since rank 0 decides before they exist.
    """
    variable = f"LIT_GPT_DECIDED_{name.upper()}"
    environment = _external_launcher()
    if environment is not None and environment.world_size() > 1:
        return _through_store(name, decide, environment)
    if "LOCAL_RANK" in os.environ and variable in os.environ:
        return os.environ[variable]
    os.environ[variable] = decide()
    return os.environ[variable]


def is_rank_zero() -> bool:
    """Whether this process is the first of the run, whoever started it."""
    environment = _external_launcher()
    rank = os.environ.get("LOCAL_RANK", "0") if environment is None else environment.global_rank()
    return int(rank) == 0 and (environment is not None or os.environ.get("NODE_RANK", "0") == "0")


def _external_launcher() -> ClusterEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    return SLURMEnvironment() if SLURMEnvironment.detect() else None


def _through_store(name: str, decide: Callable[[], str], environment: ClusterEnvironment) -> str:
    global _calls
    _calls += 1
    is_master = environment.global_rank() == 0
    port = environment.main_port + _calls  # a store of its own for each decision: none waits on a closing one
    store = TCPStore(environment.main_address, port, environment.world_size(), is_master, _TIMEOUT)
    if is_master:
        try:
            store.set(name, "=" + decide())
        except BaseException as error:
            store.set(name, "!" + " ".join(str(error).split()))
            raise
    value = store.get(name).decode()
    if store.add("read", 1) == environment.world_size():
        store.set("all read", "")
    if is_master:  # the store lives in this process: it must not end before the last rank has read
        store.wait(["all read"])
    if value.startswith("!"):
        raise RuntimeError(f"rank 0 failed: {value[1:]}")
    return value[1:]
