"""The end of all ranks when one of them fails, stops answering or stands still: one line on each, within a minute.

A rank that waits for a lost one in a collective would wait for the process group's time-out, half an hour. So a run of
several ranks has two threads in each. One talks to the run's store, which can block it: it exchanges decisions and
heartbeats, and judges those of others. The second one needs no store: once a failure is known it ends this process, if
that may be done and the main thread does not end by itself.

Standing still differs from slow work by the marks that the main thread sets (`callbacks/rank_progress.py`): only
between two marks of batches is there a limit, and it grows with the longest pause seen. Writing checkpoints, generating
samples and compiling have none.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from torch.distributed import DistError, PrefixStore

from lit_gpt.errors import UserError
from lit_gpt.train.ranks import RankFailure, Ranks

_TICK = 0.25  # seconds


@dataclass(frozen=True)
class RankLimits:
    """Seconds that the ranks of a run wait for one another.

    Attributes:
        arrival: for the store of rank 0, since nodes of a cluster do not start at the same time.
        silence: without a heartbeat, or without the next batch, after which a rank counts as lost.
        line: for a process to say why it ends, or to hear why others do.
        saving: for rank 0 of a training run to notice that another rank has failed.
        writing: for a checkpoint that is written on the way out.
        exit: for an interpreter to end, where a process group may still wait for ranks that are no more.
    """

    arrival: float = 600.0
    silence: float = 40.0
    line: float = 3.0
    saving: float = 15.0
    writing: float = 600.0
    exit: int = 30


class Failure(NamedTuple):
    """How a run failed: on which rank, whether on bad input, and a line that names the rank."""

    culprit: int
    is_input: bool
    line: str


class _Mark(NamedTuple):
    """Where the main thread is, and since when on this watch's clock."""

    number: int
    text: str
    is_limited: bool
    since: float


class RankWatch:
    """Tells this rank of the others' decisions and failures, and the others of its own.

    Attributes:
        ranks: this process among those of the run.
        failure: how the run failed, once that is known.
        children: the processes of the ranks that follow this one, if Lightning has started them from here.
    """

    def __init__(self, ranks: Ranks, limits: RankLimits, prefix: str, may_exit: bool) -> None:
        """Connect to the other ranks and watch them.

        Args:
            ranks: this process among them.
            limits: how long to wait for what.
            prefix: of keys in the store, which may outlive this run.
            may_exit: whether this process is there for the run alone, and is ended where its main thread is stuck.

        Raises:
            UserError: if the port of the store cannot be had.
            RankFailure: if rank 0 does not answer.
        """
        self.ranks, self.limits, self._prefix, self._may_exit = ranks, limits, prefix, may_exit
        self.failure: Failure | None = None
        self.children: list[subprocess.Popen[bytes]] = []
        self.port = ranks.port
        self._changed = threading.Condition()  # around all that follows
        self._store: PrefixStore | None = None
        self._refusal: Exception | None = None  # of the store's port or owner
        self._outgoing: dict[str, str] = {}
        self._wanted: set[str] = set()
        self._received: dict[str, str] = {}
        self._declared: Failure | None = None  # found out here, to be told to the others
        self._seen: dict[int, tuple[int, float]] = {}  # rank → number of its last heartbeat, and when it came
        self._done: set[int] = set()  # ranks that have come to their end
        self._informed = 0  # ranks that know of the failure
        self._clock = self._exchanged = 0.0  # seconds of this process running: one that was stopped blames nobody
        self._mark, self._longest = _Mark(0, "", False, 0.0), 0.0
        self._ends_since: float | None = None
        self._known_since: float | None = None
        self._wake, self._closed = threading.Event(), threading.Event()
        loops = (self._exchange_loop, self._guard_loop)
        self._threads = [threading.Thread(target=loop, name="lit_gpt ranks", daemon=True) for loop in loops]
        self._start()

    def _start(self) -> None:
        for thread in self._threads:
            thread.start()
        try:
            # TCPStore waits for ever for a reply, so that this wait has a limit of its own.
            self._wait(lambda: bool(self._store or self._refusal or self.failure), self.limits.arrival + 10)
            self.raise_if_failed()
            if self._store is None:
                raise self._refusal or RankFailure(self.ranks.no_answer(self.limits.arrival))
        except BaseException:
            self.close()
            raise

    # The main thread -------------------------------------------------------------------------------------------------

    def publish(self, key: str, value: str) -> None:
        """Tell all ranks of a decision. Raises UserError or RankFailure as `learn`."""
        with self._changed:
            self._outgoing[key] = value
        self._wake.set()
        self._wait(lambda: key not in self._outgoing or self.failure is not None, self.limits.silence)
        self.raise_if_failed()

    def learn(self, key: str, seconds: float | None) -> str:
        """What rank 0 has published.

        Raises:
            UserError: if a rank has failed on bad input.
            RankFailure: if one failed otherwise, or nothing came for so many `seconds`.
        """
        self._wanted.add(key)
        self._wake.set()
        self._wait(lambda: key in self._received or self.failure is not None, seconds)
        self._wanted.discard(key)
        self.raise_if_failed()
        if key not in self._received:
            raise RankFailure(f"rank 0 has not decided on {key} for {seconds:.0f} s")
        return self._received[key]

    def mark(self, text: str, is_limited: bool) -> None:
        """The main thread has come this far.

        Args:
            text: where that is, for the message about a rank that does not get past it.
            is_limited: whether the next mark should come as soon as marks before did.
        """
        old, now = self._mark, self._clock
        if old.is_limited and is_limited:
            self._longest = max(self._longest, now - old.since)
        self._mark = _Mark(old.number + 1, text, is_limited, now)

    def begin_ending(self) -> None:
        """The main thread ends by itself: it has time to save."""
        if self._ends_since is None:
            self._ends_since = self._clock

    def report(self, error: BaseException) -> None:
        """The main thread ends by itself on `error`: tell the others; what is known of an earlier failure stands."""
        if self._ends_since is not None:
            return
        self.begin_ending()
        message = " ".join(str(error).split())
        line = f"rank {self.ranks.rank} failed: {type(error).__name__}: {message}"
        if isinstance(error, UserError):
            line = f"on rank {self.ranks.rank}: {message}"
        if is_lost_connection(error):  # which is noticed before its cause is known
            self._wait(lambda: self.failure is not None, 2 * self.limits.line)
            silent = [rank for rank, (_, since) in self._seen.items() if self._clock - since > self.limits.line]
            line = f"the connection to rank {' and '.join(map(str, silent)) or '?'} was lost"
        self._declare(Failure(self.ranks.rank, isinstance(error, UserError), line))
        self._wait(lambda: self.failure is not None, self.limits.line)

    def raise_if_failed(self) -> None:
        """Raise UserError or RankFailure with the line about the failed rank, if there is one."""
        failure = self.failure
        if failure is not None and failure.is_input:
            raise UserError(failure.line)
        if failure is not None:
            raise RankFailure(self._line(failure))

    def finish(self, seconds: float | None = None) -> None:
        """Wait, on rank 0, with whose process the store may end, for the ranks that are not done: so long at most.

        Raises:
            UserError, RankFailure: if another rank fails before it is done.
        """
        if self.ranks.rank == 0:
            self._wait(lambda: self.failure is not None or self._seen.keys() <= self._done, seconds)
        self.raise_if_failed()

    def close(self) -> None:
        """This rank is done: it neither judges nor is judged from here on, and no process that it started is left."""
        if self.failure is not None:  # the store may end with this process: the others hear of the failure first
            others = self._seen.keys() - self._done - {self.failure.culprit}
            self._wait(lambda: self.ranks.rank != 0 or self._informed > len(others), self.limits.line)
            if self._may_exit:
                atexit.register(signal.alarm, self.limits.exit)
        self._closed.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(self.limits.line)
        self._store = None
        self._end_children(10.0)

    def _wait(self, is_true: Callable[[], bool], seconds: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(is_true, seconds)

    def _line(self, failure: Failure) -> str:
        onward = "; go on from the last checkpoint with --ckpt_path last" if self._mark.number else ""
        return f"{failure.line}; rank {self.ranks.rank} ends{onward}"

    # The thread that talks to the store ------------------------------------------------------------------------------

    def _exchange_loop(self) -> None:
        try:
            connection = self.ranks.connect(self.limits.arrival)
        except Exception as error:
            with self._changed:
                self._refusal = error
                self._changed.notify_all()
            return
        self.port, store = connection.port, PrefixStore(self._prefix, connection)
        number = 0
        with suppress(RuntimeError):  # of the store: see below
            while not self._closed.is_set():
                number += 1
                self._exchange(store, number)
                self._wake.wait(0.1 if self._wanted or self.failure else min(1.0, self.limits.silence / 10))
                self._wake.clear()
            store.set(f"alive/{self.ranks.rank}", json.dumps([-1, sys.maxsize, None]))
            return
        self._know(Failure(0, False, f"{self.ranks.store_owner} has ended"))

    def _exchange(self, store: PrefixStore, number: int) -> None:
        store.set(f"alive/{self.ranks.rank}", json.dumps([number, *self._progress()]))
        for key, value in list(self._outgoing.items()):
            store.set(key, value)
            del self._outgoing[key]
        for key in list(self._wanted):
            if store.check([key]):
                self._received[key] = store.get(key).decode()
        if self.failure is None:
            self._judge(store)
        if self._declared is not None:
            store.compare_set("failed", "", json.dumps(self._declared))  # the first cause is the cause
        if store.check(["failed"]):
            if self.failure is None:
                self._know(Failure(*json.loads(store.get("failed"))))
                store.add("informed", 1)
            self._informed = store.add("informed", 0)
        with self._changed:
            self._store, self._exchanged = store, self._clock
            self._changed.notify_all()

    def _declare(self, failure: Failure) -> None:
        self._declared = self._declared or failure
        self._wake.set()

    def _know(self, failure: Failure) -> None:
        with self._changed:
            self.failure = self.failure or failure
            self._changed.notify_all()

    def _progress(self) -> tuple[int, str | None]:
        """(number of the last mark, how long the main thread has not got past it if that is too long)."""
        mark = self._mark
        seconds = self._clock - mark.since
        if not mark.is_limited or seconds <= max(self.limits.silence, 10 * self._longest):
            return mark.number, None
        if self._ends_since is not None:
            return mark.number, None
        return mark.number, f"has stood still for {seconds:.0f} s {mark.text}"

    def _judge(self, store: PrefixStore) -> None:
        """Declare the failure of a rank that is silent; on rank 0 also that of one for which the others wait.

        All ranks set the same marks in the same order: who is farthest behind is not waiting for another one.
        """
        own, limit = self.ranks.rank, self.limits.silence
        progress = {own: self._progress()}
        for rank in range(1, self.ranks.world_size) if own == 0 else range(1):
            if not store.check([f"alive/{rank}"]):
                continue  # it has not arrived; the process group waits for it as long as it thinks right
            number, *marked = json.loads(store.get(f"alive/{rank}"))
            progress[rank] = marked[0], marked[1]
            known, since = self._seen.get(rank, (0, self._clock))
            if number < 0:
                self._done.add(rank)
            elif number == known and self._clock - since > limit:
                return self._declare(Failure(rank, False, f"rank {rank} has not answered for {limit:.0f} s"))
            if number != known:
                self._seen[rank] = (number, self._clock)
        last = min(progress, key=lambda rank: progress[rank][0])
        standstill = progress[last][1]
        if own == 0 and standstill is not None:
            self._declare(Failure(last, False, f"rank {last} {standstill}"))

    # The thread that ends processes ----------------------------------------------------------------------------------

    def _guard_loop(self) -> None:
        while not self._closed.wait(_TICK):
            self._clock += _TICK
            self._find_lost()
            if self.failure is not None:
                self._end_if_stuck(self.failure)

    def _find_lost(self) -> None:
        """Find out about children that have failed and a store that does not answer."""
        for index, child in enumerate(self.children):
            rank = self.ranks.rank + 1 + index
            if child.poll() and rank not in self._done:
                self._declare(Failure(rank, child.returncode == 2, f"rank {rank} {describe_end(child.returncode)}"))
        if self._store is not None and self._clock - self._exchanged > self.limits.silence:
            self._know(Failure(0, False, f"{self.ranks.store_owner} has not answered for {self.limits.silence:.0f} s"))

    def _end_if_stuck(self, failure: Failure) -> None:
        """Kill a child that does not end after its failure; end this process where it waits for a failed one."""
        self._known_since = self._clock if self._known_since is None else self._known_since
        waited, rank = self._clock - self._known_since, self.ranks.rank
        index = failure.culprit - rank - 1
        if waited > self.limits.line and 0 <= index < len(self.children):
            self.children[index].kill()  # stopped or stuck; the others' collectives fail with it
        if self._ends_since is not None:
            is_over = self._clock - self._ends_since > self.limits.writing
        else:
            may_save = rank == 0 != failure.culprit and self._mark.number > 0
            is_over = waited > (self.limits.saving if may_save else self.limits.line)
        if is_over and self._may_exit:
            kind, status = ("error", 2) if failure.is_input else ("failed: RankFailure", 1)
            os.write(2, f"\nlit_gpt: {kind}: {self._line(failure)}\n".encode())
            self._end_children(self.limits.line)
            os._exit(status)

    def _end_children(self, seconds: float) -> None:
        """Wait a while for the children, kill those that are left, and reap all."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(child.poll() is None for child in self.children):
            time.sleep(0.05)
        for child in self.children:
            child.kill()
            child.wait()


def describe_end(status: int) -> str:
    """How a process ended, from its `returncode`."""
    if status >= 0:
        return f"ended with status {status}"
    reason = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{reason}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed, which says nothing about why: gloo raises plain RuntimeErrors."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))
