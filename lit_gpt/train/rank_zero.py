"""Decisions of rank 0 and one configuration, shared by all ranks before there is a process group."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from jsonargparse import Namespace

from lit_gpt.errors import UserError
from lit_gpt.train.lightning_fixes import observe_children
from lit_gpt.train.rank_watch import RankLimits, RankWatch, is_lost_connection
from lit_gpt.train.ranks import RankFailure, find_ranks, is_launched

SHORT_SECONDS = 600.0
"""For a decision of seconds, such as a timing; preparing a corpus has no limit while rank 0 lives."""

_LAUNCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
_RUN_NUMBERS = itertools.count()


class _Run:
    """A run that may have several ranks, from `failures_reported` to its end."""

    def __init__(self, limits: RankLimits, may_exit: bool) -> None:
        self.limits, self.may_exit = limits, may_exit
        self.watch: RankWatch | None = None
        self.environment: dict[str, str | None] = {}

    def connect(self, trainer: Namespace) -> None:
        ranks = find_ranks(trainer)
        if ranks is None or self.watch is not None:
            return
        # torchrun's store outlives a restart of the ranks, and a process may make several runs.
        prefix = f"lit_gpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{next(_RUN_NUMBERS)}"
        self.watch = RankWatch(ranks, self.limits, prefix, self.may_exit)
        self.environment = {name: os.environ.get(name) for name in _LAUNCH_VARIABLES}
        if ranks.port == 0:  # the ranks that Lightning starts, and its process group, find the store here
            os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = ranks.address, str(self.watch.port)
        observe_children(lambda children: setattr(self.watch, "children", children))

    def close(self) -> None:
        """Leave no thread, no process and no variable of the environment behind."""
        if self.watch is None:
            return
        observe_children(None)
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self.watch.close()


_run: _Run | None = None


@contextmanager
def failures_reported(is_program: bool = False, limits: RankLimits | None = None) -> Iterator[None]:
    """Around a run: ranks may meet in the block, and each is told when the block fails on another.

    Args:
        is_program: whether this process is there for the run alone, as a launched rank is: it may then be ended where
            its main thread waits for a rank that has failed. The process of a caller is not.
        limits: how long ranks wait for one another.

    Raises:
        UserError, RankFailure: where the block only ends because it fails elsewhere.
    """
    global _run
    before, run = _run, _Run(limits or RankLimits(), is_program or is_launched())
    _run = run
    try:
        yield
        if run.watch is not None:
            run.watch.finish()
    except SystemExit:  # an end that was asked for, by the same signal on all
        if run.watch is not None:
            run.watch.begin_ending()
            with suppress(UserError, RankFailure):
                run.watch.finish(seconds=10)
        raise
    except BaseException as error:
        if run.watch is not None:
            run.watch.report(error)
            if is_lost_connection(error):
                run.watch.raise_if_failed()
        raise
    finally:
        run.close()
        _run = before


def connect_ranks(trainer: Namespace) -> None:
    """Meet the other processes of this run, if there are any, and watch them until `failures_reported` is left.

    Args:
        trainer: the Trainer's options.

    Raises:
        UserError: if the ranks cannot meet as they were started.
        RankFailure: if rank 0 does not answer.
    """
    if _run is not None:
        _run.connect(trainer)


def current_watch() -> RankWatch | None:
    """The watch of this run, if `connect_ranks` has found other ranks."""
    return None if _run is None else _run.watch


def is_rank_zero() -> bool:
    """Whether this process is the first of the run, whoever started it."""
    watch = current_watch()
    if watch is not None:
        return watch.ranks.rank == 0
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == os.environ.get("NODE_RANK", "0") == "0"


# Decisions -----------------------------------------------------------------------------------------------------------


def decide_once(name: str, decide: Callable[[], str], seconds: float | None = SHORT_SECONDS) -> str:
    """Run `decide` on rank 0 only and return its result on every rank of every node.

    Args:
        name: of the decision; each has its own.
        decide: called on rank 0, or where `connect_ranks` has found no other rank.
        seconds: the limit; None for none but rank 0's heartbeat.

    Raises:
        UserError: if a rank has failed on bad input.
        RankFailure: if one failed otherwise or ended, or rank 0 exceeded the limit.
    """
    watch = current_watch()
    if watch is None:
        return decide()
    if watch.ranks.rank != 0:
        return watch.learn(name, seconds)
    value = decide()
    watch.publish(name, value)
    return value


def check_same_configuration(name: str, options: Mapping[str, Any]) -> None:
    """Refuse to run with other options than rank 0 has.

    Args:
        name: of this check; each has its own.
        options: nested.

    Raises:
        UserError: with the keys that differ and both their values.
        RankFailure: as `decide_once`.
    """
    if current_watch() is None:
        return
    own = dict(_flat(options))
    first = json.loads(decide_once(name, lambda: json.dumps(own)))
    differing = [key for key in sorted(own.keys() | first.keys()) if own.get(key) != first.get(key)]
    if differing:
        listed = "; ".join(f"{key}={own.get(key)} where rank 0 has {first.get(key)}" for key in differing[:5])
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise UserError(
            f"this rank's configuration is not rank 0's: {listed}{more}; start all ranks with the same arguments, "
            f"environment and data"
        )


def _flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every option."""
    for key, value in options.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, json.dumps(value, default=str, sort_keys=True)
