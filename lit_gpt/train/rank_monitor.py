"""The end of all ranks when one of them fails, stops answering or stands still: one line on each, within a minute.

A rank that waits for a lost one in a collective would wait for the process group's time-out, half an hour. So each rank
has two threads of ours. One exchanges heartbeats through the run's store every second, and rank 0 judges them. The
other needs no store: it ends the process if its main thread has not ended by itself once a failure is known.

Standing still differs from slow work by the marks that the main thread sets: only between two marks of batches is
there a limit, and it grows with the longest pause seen. Writing checkpoints, generating
samples and compiling have none.
"""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from torch.distributed import DistError

from lit_gpt.errors import UserError
from lit_gpt.train.rank_children import LINE_SECONDS, end_children, end_process, kill_child
from lit_gpt.train.ranks import RankFailure, Ranks, reach, shared

GRACE_SECONDS = 15.0
"""For rank 0 to end by itself, with a checkpoint if it can, once it is known that another rank failed."""
SAVE_SECONDS = 600.0
"""For a main thread that is ending by itself."""
EXIT_SECONDS = 30
"""For the interpreter's own end, where a process group may still wait for ranks that are no more."""
_TICK = 0.25


def silence_limit() -> float:
    """Seconds without an answer, or without a step, after which a rank counts as lost: LIT_GPT_RANK_TIMEOUT, or 40.

    Raises:
        UserError: if that variable is no number of at least 2.
    """
    text = os.environ.get("LIT_GPT_RANK_TIMEOUT", "40")
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 2 <= seconds < float("inf"):
        raise UserError(f"LIT_GPT_RANK_TIMEOUT={text} must be a number of seconds, at least 2")
    return seconds


class _Mark(NamedTuple):
    """Where a main thread is, and since when on this monitor's clock."""

    number: int
    text: str
    is_limited: bool
    since: float


class RankMonitor:
    """Tells this rank of the others' failures and the others of its own.

    Attributes:
        rank: of this process.
        world_size: processes of the run.
        limit: seconds after which a silent rank counts as lost.
        cause: how the run failed, once that is known: a line that names the rank.
    """

    def __init__(self, ranks: Ranks, use: int = 0) -> None:
        """A monitor of this run, or of its `use`-th fit. Raises UserError, RankFailure as `Ranks.connect`."""
        self.rank, self.world_size, self.limit = ranks.rank, ranks.world_size, silence_limit()
        self.cause: str | None = None
        self._connection = ranks.connect()  # this thread's own: a call to the store blocks whoever shares it
        self._store = shared(self._connection, use)
        self._sentinel = reach(ranks.address, self._connection.port, self.limit)
        self._clock = self._exchanged = 0.0  # seconds of this process running: one that was stopped blames nobody
        self._mark = _Mark(0, "starting", False, 0.0)
        self._longest = 0.0
        self._own_failure: str | None = None
        self._ends_since: float | None = None
        self._known_since: float | None = None
        self._culprit: int | None = None
        self._seen: dict[int, tuple[int, float]] = {}  # rank → number of its last heartbeat, and when it came
        self._done: set[int] = set()  # ranks that have come to their end
        self._wake, self._reported, self._stopped = threading.Event(), threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> RankMonitor:
        """Begin to exchange heartbeats."""
        for target in (self._exchange_loop, self._guard_loop):
            thread = threading.Thread(target=target, name="lit_gpt ranks", daemon=True)
            thread.start()
            self._threads.append(thread)
        # A thread in the store's code when the interpreter ends would abort the process.
        atexit.register(self._stop_at_exit)
        return self

    def _stop_at_exit(self) -> None:
        self.stop()
        if any(thread.is_alive() for thread in self._threads):  # in a call to a store that does not answer
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def stop(self) -> None:
        """This rank is done: it neither judges nor is judged from here on."""
        self._stopped.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(3)

    def finish(self) -> None:
        """This rank is done. Rank 0, with whose process the store may end, waits for those that are not.

        Raises:
            RankFailure: on rank 0, if another rank fails before it is done.
        """
        while self.rank == 0 and self.cause is None and self._seen.keys() - self._done:
            time.sleep(0.05)
        if self.rank == 0 and self.cause is not None:
            raise RankFailure(self.cause)
        self.stop()

    # The main thread -------------------------------------------------------------------------------------------------

    def mark(self, text: str, is_limited: bool) -> None:
        """The main thread has come this far.

        Args:
            text: what it does now, for the message about a rank that does not get past it.
            is_limited: whether the next mark should come as soon as marks before did.
        """
        old, now = self._mark, self._clock
        if old.is_limited and is_limited:
            self._longest = max(self._longest, now - old.since)
        self._mark = _Mark(old.number + 1, text, is_limited, now)

    def fail(self, message: str) -> None:
        """Tell the other ranks that this one ends, and why; what is known of an earlier failure stands."""
        self._own_failure = self._own_failure or message
        self.begin_ending()
        self._wake.set()
        self._reported.wait(3)
        deadline = time.monotonic() + 3
        with suppress(RuntimeError):  # of the store, which may end with this process: the others read from it first
            while self.rank == 0 and not self._all_know() and time.monotonic() < deadline:
                time.sleep(0.05)

    def _all_know(self) -> bool:
        return int(self._store.add("know", 0)) > len(self._seen.keys() - self._done)

    def begin_ending(self) -> None:
        """The main thread ends by itself: it has time to save."""
        if self._ends_since is None:
            self._ends_since = self._clock

    def wait_for_cause(self, seconds: float) -> str | None:
        """The cause, waited for so long at most: a lost connection is noticed before its cause is known."""
        for _ in range(int(seconds / 0.1)):
            if self.cause is not None:
                break
            self._stopped.wait(0.1)
        return self.cause

    # The thread that talks to the store ------------------------------------------------------------------------------

    def _exchange_loop(self) -> None:
        number = 0
        while not self._stopped.is_set() and not self.has_lost_store():
            number += 1
            try:
                self._exchange(number)
            except RuntimeError:  # of the store; the guard says what it means
                return
            self._exchanged = self._clock
            self._wake.wait(min(1.0, self.limit / 10))
            self._wake.clear()
        with suppress(RuntimeError):
            if not self.has_lost_store():
                self._store.set(f"alive/{self.rank}", json.dumps([-1, (sys.maxsize, None)]))

    def _exchange(self, number: int) -> None:
        if self._own_failure is not None and not self._reported.is_set():
            self._declare(self.rank, self._own_failure)
            self._reported.set()
        self._store.set(f"alive/{self.rank}", json.dumps([number, self._progress()]))
        if self._store.check(["failed"]):
            culprit, cause = json.loads(self._store.get("failed"))
            if self.cause is None:
                self._store.add("know", 1)
            self._culprit, self.cause = culprit, cause
        elif self.rank == 0:
            self._judge(range(1, self.world_size))
        else:
            self._judge(range(1))

    def declare(self, culprit: int, cause: str) -> None:
        """Another rank has failed, as a thread of this one has found out."""
        with suppress(RuntimeError):
            self._declare(culprit, cause)
        self._wake.set()

    def _declare(self, culprit: int, cause: str) -> None:
        self._store.compare_set("failed", "", json.dumps([culprit, cause]))  # the first cause is the cause

    def _progress(self) -> tuple[int, str | None]:
        """(number of the last mark, how long the main thread has not got past it if that is too long)."""
        mark = self._mark
        seconds = self._clock - mark.since
        if not mark.is_limited or seconds <= max(self.limit, 10 * self._longest) or self._ends_since is not None:
            return mark.number, None
        return mark.number, f"has stood still for {seconds:.0f} s (LIT_GPT_RANK_TIMEOUT={self.limit:.0f}): {mark.text}"

    def _judge(self, ranks: range) -> None:
        """Declare the failure of a rank that is silent; on rank 0 also that of one for which the others wait.

        All ranks set the same marks in the same order: who is farthest behind is not waiting for another one.
        """
        progress = {self.rank: self._progress()}
        for rank in ranks:
            key = f"alive/{rank}"
            if not self._store.check([key]):
                continue  # it has not arrived; the process group waits for it as long as it thinks right
            number, progress[rank] = json.loads(self._store.get(key))
            known, since = self._seen.get(rank, (0, self._clock))
            if number == known and number > 0 and self._clock - since > self.limit:
                self._declare(rank, f"rank {rank} has not answered for {self.limit:.0f} s (LIT_GPT_RANK_TIMEOUT)")
                return
            if number < 0:
                self._done.add(rank)
            if number != known:
                self._seen[rank] = (number, self._clock)
        last = min(progress, key=lambda rank: progress[rank][0])
        standstill = progress[last][1]
        if self.rank == 0 and standstill is not None:
            self._declare(last, f"rank {last} {standstill}")

    # The thread that ends the process --------------------------------------------------------------------------------

    def _guard_loop(self) -> None:
        while not self._stopped.wait(_TICK):
            self._clock += _TICK
            self._find_lost_store()
            if self.cause is not None:
                self._known_since = self._clock if self._known_since is None else self._known_since
                if self._culprit is not None and self._clock - self._known_since > LINE_SECONDS:
                    kill_child(self._culprit - self.rank - 1)  # stopped or stuck; the others' collectives fail with it
                if self._is_over():
                    end_process(self.rank, self.cause)

    def has_lost_store(self) -> bool:
        """Whether the process with the store has ended. A call to its store would write a stack trace to stderr."""
        return self.rank != 0 and _is_closed(self._sentinel)

    def _find_lost_store(self) -> None:
        host = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        if self.cause is None and self.has_lost_store():
            self.cause = f"{host} has ended"
        if self.cause is None and self._clock - self._exchanged > self.limit:
            self.cause = f"{host} has not answered for {self.limit:.0f} s"

    def _is_over(self) -> bool:
        if self._ends_since is not None:
            return self._clock - self._ends_since > SAVE_SECONDS
        assert self._known_since is not None
        grace = GRACE_SECONDS if self.rank == 0 else LINE_SECONDS
        return self._culprit == self.rank or self._clock - self._known_since > grace


def is_lost_connection(exception: BaseException) -> bool:
    """Whether a collective failed, which says nothing about why: gloo raises plain RuntimeErrors."""
    return isinstance(exception, DistError) or (isinstance(exception, RuntimeError) and "gloo" in str(exception))


def exit_in_bounded_time() -> None:
    """End the children, and bound the interpreter's end: a process group's destructor waits for lost ranks."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(EXIT_SECONDS)
    end_children()


def _is_closed(connection: socket.socket) -> bool:
    """Whether the other end of a connection on which nothing is ever said has closed it."""
    try:
        return bool(select.select([connection], [], [], 0)[0]) and connection.recv(1, socket.MSG_PEEK) == b""
    except OSError:
        return True
