"""The one thread that owns the decoding engine, and the places in the queue before it.

Requests live on the event loop, the engine on its thread. Between them go callables in one direction (an inbox that the
thread empties before every step) and, in the other, one batch of news per step.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation import Strategy
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Output
from lit_gpt.serve.api_errors import ApiError, bad_request
from lit_gpt.serve.middleware import where_it_failed
from lit_gpt.serve.prometheus import Metrics

log = logging.getLogger("lit_gpt.serve")

News = tuple[int, Output]
"""Which of a job's prompts, and what the engine says about it."""


@dataclass(frozen=True)
class Limits:
    """What the server allows.

    Attributes:
        max_queue: sequences that may wait while all slots are busy.
        queue_seconds: how long a request may wait for its first step.
        request_seconds: how long it may take altogether.
        drain_seconds: how long running requests may go on after SIGTERM.
    """

    max_queue: int = 64
    queue_seconds: float = 60.0
    request_seconds: float = 600.0
    drain_seconds: float = 30.0


@dataclass(eq=False)
class Job:
    """One HTTP request in the engine: some prompts, each with some samples.

    Attributes:
        open: continuations whose end has not been read.
        engine_ids: what the engine calls its prompts; on the engine's thread only, as is `started`.
        started: when the first of them left the queue.
    """

    arrived: float
    open: int
    news: asyncio.Queue[News | ApiError] = field(default_factory=asyncio.Queue)
    engine_ids: list[int] = field(default_factory=list)
    started: float | None = None
    last_token: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass(eq=False)
class Seat:
    """One of a job's prompts in the engine, and how many of its continuations have not ended."""

    job: Job
    prompt: int
    open: int


class Worker:
    """Runs an `Engine` on a thread of its own.

    Attributes:
        engine: touched by that thread only, but for reading counters.
        fault: why the engine takes nothing any more, or None.
        died: whether it failed by itself.
        draining: no new requests; what runs may finish.
    """

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.fault: str | None = None
        self.died = False
        self.draining = False
        self._reused = 0  # prefix tokens counted so far; on the engine's thread only
        self._seats: dict[int, Seat] = {}  # by the engine's id, as the next; on the engine's thread only
        self._unstarted: set[int] = set()
        self._taken = 0  # places reserved; on the event loop only
        self._mean_seconds = 1.0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # between dying and putting into the inbox
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- on the event loop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin; called on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End: what still runs fails with 503."""
        with suppress(ApiError):
            self._send(lambda: self._end("the server is shutting down"))
        self._thread.join(timeout=10)

    @property
    def places(self) -> int:
        """Sequences that may be in the house: one for each slot, and those that wait."""
        return self.engine.slots.n_slot + self.limits.max_queue

    @property
    def taken(self) -> int:
        """Places reserved now."""
        return self._taken

    def check_open(self) -> None:
        """Refuse what cannot be served any more.

        Raises:
            ApiError: 503.
        """
        if self.fault is not None:
            raise ApiError(503, "the engine is dead: restart the server", code="engine_dead")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold `count` places; taken before any work (tokenising included) is spent on a request.

        Raises:
            ApiError: 503 while closing, 400 for more than there will ever be, 429 for more than there are now.
        """
        self.check_open()
        if count > self.places:
            raise bad_request(f"prompts × n = {count} is more than this server takes at once: {self.places}", "n")
        if self._taken + count > self.places:
            waiting = self._taken - self.engine.slots.n_slot + count
            seconds = min(60, max(1, round(self._mean_seconds * waiting / self.engine.slots.n_slot)))
            text = f"all {self.places} places are taken: try again in {seconds} s"
            raise ApiError(429, text, code="queue_full", headers={"Retry-After": str(seconds)})
        self._taken += count
        began = time.perf_counter()
        try:
            yield
        finally:
            self._taken -= count
            self._mean_seconds += 0.1 * (time.perf_counter() - began - self._mean_seconds)

    async def run(
        self,
        prompts: Sequence[Sequence[int]],
        generation_config: GenerationConfig,
        arrived: float,
        strategy: Strategy | None = None,
    ) -> AsyncGenerator[News, None]:
        """News of all continuations until the last has ended; close it early and they are cancelled.

        Raises:
            ApiError: 400 for what the engine refuses, 503 if the wait is too long or the engine dies, 504 if the
                whole request takes too long.
        """
        job = Job(arrived, len(prompts) * generation_config.num_samples)
        self._send(lambda: self._admit(job, prompts, generation_config, strategy))
        try:
            while job.open:
                news = await self._next(job)
                if isinstance(news, ApiError):
                    raise news
                job.open -= news[1].finish_reason is not None
                yield news
        finally:
            if job.open:
                with suppress(ApiError):
                    self._send(lambda: self._cancel(job))
            self.metrics.end_to_end.observe(time.perf_counter() - arrived)

    async def _next(self, job: Job) -> News | ApiError:
        """The next news, within the limits of waiting and of the whole."""
        limits = self.limits
        waiting = job.started is None and limits.queue_seconds < limits.request_seconds
        left = job.arrived + (limits.queue_seconds if waiting else limits.request_seconds) - time.perf_counter()
        try:
            async with asyncio.timeout(left):
                return await job.news.get()
        except TimeoutError:
            if waiting and job.started is not None:
                return await self._next(job)
        if waiting:
            raise ApiError(503, "no slot became free in time", code="queue_timeout", headers={"Retry-After": "5"})
        # a second try would take as long: OpenAI's client honours this header
        raise ApiError(504, "the request took too long", code="request_timeout", headers={"x-should-retry": "false"})

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self.fault is not None:
                raise ApiError(503, "the engine is dead: restart the server", code="engine_dead")
            self._inbox.put(command)

    def _deliver(self, batch: list[tuple[Job, int, Output]], now: float) -> None:
        """Hand a step's news to the requests, and count."""
        for job, prompt, output in batch:
            self._count(job, prompt, output, now)
            if output.finish_reason is not None:
                self.metrics.finished.labels(output.finish_reason).inc()
            job.news.put_nowait((prompt, output))

    def _count(self, job: Job, prompt: int, output: Output, now: float) -> None:
        if not output.tokens:
            return
        self.metrics.generation_tokens.inc(len(output.tokens))
        if not job.last_token:
            self.metrics.first_token.observe(now - job.arrived)
        before = job.last_token.get((prompt, output.index))
        if before is not None:
            self.metrics.per_token.observe((now - before) / len(output.tokens))
        job.last_token[prompt, output.index] = now

    # --- on the engine's thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._ended:
                self._obey(wait=not self.engine.has_work)
                if self.engine.has_work and not self._ended:
                    self._publish(self.engine.step())
        except BaseException as error:
            log.error("the engine died: %s", where_it_failed(error))
            self.died = True
            self._end("the engine failed: restart the server")

    def _obey(self, wait: bool) -> None:
        """Do what the event loop has asked for."""
        if wait:
            self._inbox.get()()
        while not self._ended:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _admit(
        self, job: Job, prompts: Sequence[Sequence[int]], generation_config: GenerationConfig, strategy: Strategy | None
    ) -> None:
        try:
            for i, ids in enumerate(prompts):
                engine_id = self.engine.submit(ids, generation_config, strategy=strategy)
                job.engine_ids.append(engine_id)
                self._seats[engine_id] = Seat(job, i, generation_config.num_samples)
                self._unstarted.add(engine_id)
        except UserError as error:
            fault = bad_request(str(error))
            self._cancel(job)
            self._post(lambda: job.news.put_nowait(fault))

    def _cancel(self, job: Job) -> None:
        for engine_id in job.engine_ids:
            self._unstarted.discard(engine_id)
            if self._seats.pop(engine_id, None) is not None:
                self.engine.cancel(engine_id)

    def _publish(self, outputs: list[Output]) -> None:
        """Send one step's outputs to the event loop, in one batch."""
        now = time.perf_counter()
        if self._unstarted:
            self._note_starts(now)
        self.metrics.prefix_hits.inc(max(0, self.engine.slots.reused - self._reused))
        self._reused = self.engine.slots.reused
        batch = []
        for output in outputs:
            seat = self._seats.get(output.request)
            if seat is None:  # cancelled
                continue
            batch.append((seat.job, seat.prompt, output))
            seat.open -= output.finish_reason is not None
            if not seat.open:
                del self._seats[output.request]
        if batch:
            self._post(lambda: self._deliver(batch, now))

    def _note_starts(self, now: float) -> None:
        """Requests that have left the engine's queue wait no longer."""
        for engine_id in self._unstarted - self.engine.waiting:
            self._unstarted.remove(engine_id)
            job = self._seats[engine_id].job
            if job.started is None:
                job.started = now
                self.metrics.queue_time.observe(now - job.arrived)

    def _post(self, news: Callable[[], None]) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(news)

    def _end(self, reason: str) -> None:
        """Fail everybody and take no more."""
        self._ended = True
        with self._lock:
            self.fault = reason
            while not self._inbox.empty():
                self._inbox.get_nowait()
        fault = ApiError(503, reason, code="engine_dead")
        jobs = {seat.job for seat in self._seats.values()}
        self._seats.clear()
        for job in jobs:
            self._post(lambda job=job: job.news.put_nowait(fault))  # type: ignore[misc]
