"""Decisions of rank 0 and one configuration, shared by all ranks before there is a process group."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from jsonargparse import Namespace
from torch.distributed import PrefixStore

from lit_gpt.errors import UserError
from lit_gpt.train.rank_children import watch_children
from lit_gpt.train.rank_monitor import RankMonitor, exit_in_bounded_time, is_lost_connection
from lit_gpt.train.ranks import RankFailure, Ranks, find_ranks, shared

SHORT_SECONDS = 600.0
"""For a decision of seconds, such as a timing; preparing a corpus has no limit while rank 0 lives."""
_ANSWER_SECONDS = 10.0  # for the others to read why rank 0 failed, before its store goes with it


@dataclasses.dataclass(frozen=True)
class _Connection:
    """What a process with others beside it has."""

    ranks: Ranks
    store: PrefixStore
    monitor: RankMonitor


_connection: _Connection | None = None


def connect_ranks(trainer: Namespace) -> None:
    """Meet the other processes of this run, if there are any, and watch them from here on.

    Args:
        trainer: the Trainer's options.

    Raises:
        UserError: if the ranks cannot meet as they were started.
        RankFailure: if rank 0 does not answer.
    """
    global _connection
    ranks = find_ranks(trainer)
    if ranks is None or _connection is not None:
        return
    store = ranks.connect()
    if ranks.port == 0:  # the ranks that Lightning starts, and its process group, find the store here
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.address, str(store.port)
        ranks = dataclasses.replace(ranks, port=store.port)
    monitor = RankMonitor(ranks).start()
    watch_children(lambda index, end: monitor.declare(ranks.rank + index + 1, f"rank {ranks.rank + index + 1} {end}"))
    _connection = _Connection(ranks, shared(store), monitor)


def current_monitor() -> RankMonitor | None:
    """The monitor of this run, if `connect_ranks` has found other ranks."""
    return None if _connection is None else _connection.monitor


def is_rank_zero() -> bool:
    """Whether this process is the first of the run, whoever started it."""
    if _connection is not None:
        return _connection.ranks.rank == 0
    return os.environ.get("LOCAL_RANK", "0") == os.environ.get("NODE_RANK", "0") == "0"


@contextmanager
def failures_reported() -> Iterator[None]:
    """Tell the other ranks when the block fails on this one, so that they do not wait for it.

    Raises:
        RankFailure: on rank 0, if the block has ended well here and fails elsewhere.
    """
    try:
        yield
    except SystemExit:  # an end that was asked for, by the same signal on all
        if _connection is not None:
            _connection.monitor.stop()
        raise
    except BaseException as error:
        if _connection is not None:
            lost = _report(_connection.monitor, error)
            exit_in_bounded_time()
            if lost is not None:
                raise RankFailure(lost) from error
        raise
    if _connection is not None:
        _connection.monitor.finish()


def _report(monitor: RankMonitor, error: BaseException) -> str | None:
    """Tell the others why this rank fails. The cause, where this one has only lost its connection to a failed one."""
    monitor.begin_ending()
    lost = None
    if is_lost_connection(error):
        lost = monitor.wait_for_cause(5) or "the connection to another rank was lost"
    monitor.fail(lost or f"rank {monitor.rank} failed: {type(error).__name__}: {one_line(error)}")
    return lost


def one_line(error: BaseException) -> str:
    """The message of an exception in one line."""
    return " ".join(str(error).split())


# Decisions -----------------------------------------------------------------------------------------------------------


def decide_once(name: str, decide: Callable[[], str], seconds: float | None = SHORT_SECONDS) -> str:
    """Run `decide` on rank 0 only and return its result on every rank of every node.

    Args:
        name: of the decision; each has its own.
        decide: called on rank 0, or where `connect_ranks` has found no other rank.
        seconds: the limit; None for none but rank 0's heartbeat.

    Raises:
        UserError: where `decide` raised one; the others raise it too.
        RankFailure: if rank 0 failed otherwise, ended, or exceeded the limit.
    """
    if _connection is None:
        return decide()
    return _publish(_connection, name, decide) if _connection.ranks.rank == 0 else _learn(_connection, name, seconds)


def _publish(connection: _Connection, name: str, decide: Callable[[], str]) -> str:
    try:
        value = decide()
    except BaseException as error:
        kind = "input" if isinstance(error, UserError) else "failure"
        connection.store.set(f"decided/{name}", json.dumps([kind, one_line(error) or type(error).__name__]))
        _wait_for_readers(connection, name)
        raise
    connection.store.set(f"decided/{name}", json.dumps(["value", value]))
    return value


def _wait_for_readers(connection: _Connection, name: str) -> None:
    """The store may end with this process: those that wait for it by now get time to read from it."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while int(connection.store.add(f"read/{name}", 0)) < int(connection.store.add(f"waiting/{name}", 0)):
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)


def _learn(connection: _Connection, name: str, seconds: float | None) -> str:
    deadline = None if seconds is None else time.monotonic() + seconds
    try:
        connection.store.add(f"waiting/{name}", 1)
        while True:
            if connection.monitor.cause is not None or connection.monitor.has_lost_store():
                raise RankFailure(connection.monitor.wait_for_cause(2) or "rank 0 has ended")
            if connection.store.check([f"decided/{name}"]):
                break
            if deadline is not None and time.monotonic() > deadline:
                raise RankFailure(f"rank 0 has not decided on {name} for {seconds:.0f} s")
            time.sleep(0.1)
        kind, value = json.loads(connection.store.get(f"decided/{name}"))
        connection.store.add(f"read/{name}", 1)
    except RankFailure:
        raise
    except RuntimeError as error:  # of the store
        raise RankFailure(connection.monitor.wait_for_cause(2) or "rank 0 has ended") from error
    if kind == "value":
        return str(value)
    raise UserError(f"on rank 0: {value}") if kind == "input" else RankFailure(f"rank 0 failed: {value}")


# Configuration -------------------------------------------------------------------------------------------------------


def check_same_configuration(name: str, options: Mapping[str, Any]) -> None:
    """Refuse to run with other options than rank 0 has.

    Args:
        name: of this check; each has its own.
        options: nested.

    Raises:
        UserError: with the keys that differ and both their values.
        RankFailure: as `decide_once`.
    """
    own = dict(_flat(options))
    first = json.loads(decide_once(name, lambda: json.dumps(own)))
    differing = [key for key in sorted(own.keys() | first.keys()) if own.get(key) != first.get(key)]
    if differing:
        assert _connection is not None
        listed = "; ".join(f"{key}={own.get(key)} where rank 0 has {first.get(key)}" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"rank {_connection.ranks.rank} has another configuration: {listed}{more}; start all ranks with the same "
            f"arguments, environment and data"
        )


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every option."""
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value, default=str, sort_keys=True)
