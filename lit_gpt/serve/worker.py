"""The thread that owns the generation engine, and the bounded queue in front of it.

HTTP requests are handled on the event loop, the engine runs on its own thread. The loop sends commands (callables, in
an inbox that the thread empties before every step); the thread sends back one batch of outputs per step.
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
from lit_gpt.serve.middleware import REQUEST_ID, failure_location
from lit_gpt.serve.options import Limits
from lit_gpt.serve.prometheus import Metrics

log = logging.getLogger("lit_gpt.serve")

JobOutput = tuple[int, Output]
"""The index of one of a job's prompts, and an output of the engine for it."""


@dataclass(eq=False)
class Job:
    """One HTTP request in the engine: some prompts, each with some samples.

    Attributes:
        arrived: `time.perf_counter()` at the request's start.
        open: continuations whose end has not been read.
        request_id: of the HTTP request, for the log.
        outputs: from the engine, in order; an `ApiError` is the last one.
        engine_ids: the engine's ids of its prompts; on the engine's thread only, as is `started`.
        started: when the first of them left the engine's queue, or None.
        last_token: (prompt, sample) → when its latest token came.
    """

    arrived: float
    open: int
    request_id: str
    outputs: asyncio.Queue[JobOutput | ApiError] = field(default_factory=asyncio.Queue)
    engine_ids: list[int] = field(default_factory=list)
    started: float | None = None
    last_token: dict[tuple[int, int], float] = field(default_factory=dict)


@dataclass(eq=False)
class EnginePrompt:
    """One of a job's prompts in the engine.

    Attributes:
        index: which of the job's prompts.
        open: continuations that have not ended.
    """

    job: Job
    index: int
    open: int


class Worker:
    """Runs an `Engine` on a thread of its own.

    Attributes:
        engine: touched by that thread only, but for reading counters.
        stop_reason: why the engine accepts no more commands, or None.
        failed: whether it stopped because of an exception.
        draining: no new requests; what runs may finish.
    """

    def __init__(self, engine: Engine, metrics: Metrics, limits: Limits) -> None:
        self.engine, self.metrics, self.limits = engine, metrics, limits
        self.stop_reason: str | None = None
        self.failed = False
        self.draining = False
        self._reused = 0  # prefix tokens counted so far; on the engine's thread only
        self._prompts: dict[int, EnginePrompt] = {}  # by the engine's id, as the next; on the engine's thread only
        self._unstarted: set[int] = set()
        self._reserved = 0  # sequences; on the event loop only, as are the open jobs
        self._jobs: set[Job] = set()
        self._mean_seconds = 1.0
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()  # `stop_reason` and the inbox change together
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- on the event loop ----------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engine's thread; called on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Stop the engine's thread: what still runs fails with 503."""
        with suppress(ApiError):
            self._send(lambda: self._end("the server is shutting down"))
        self._thread.join(timeout=10)

    @property
    def capacity(self) -> int:
        """Sequences that the server accepts at once: one for each slot, and `max_queue` that wait."""
        return self.engine.slots.n_slot + self.limits.max_queue

    @property
    def reserved(self) -> int:
        """Sequences of the requests being handled, running or waiting."""
        return self._reserved

    def check_open(self) -> None:
        """Refuse new requests after the engine has stopped or while draining.

        Raises:
            ApiError: 503.
        """
        if self.stop_reason is not None:
            raise ApiError(503, "the engine is dead: restart the server", code="engine_dead")
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down", headers={"Retry-After": "5"})

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Reserve capacity for `count` sequences, before any work (tokenising included) is spent on a request.

        Raises:
            ApiError: 503 while closing, 400 for more than `capacity`, 429 for more than is free now.
        """
        self.check_open()
        if count > self.capacity:
            raise bad_request(f"prompts × n = {count} is more than this server takes at once: {self.capacity}", "n")
        if self._reserved + count > self.capacity:
            waiting = self._reserved - self.engine.slots.n_slot + count
            seconds = min(60, max(1, round(self._mean_seconds * waiting / self.engine.slots.n_slot)))
            text = f"the queue is full ({self.capacity} sequences run or wait): try again in {seconds} s"
            raise ApiError(429, text, code="queue_full", headers={"Retry-After": str(seconds)})
        self._reserved += count
        began = time.perf_counter()
        try:
            yield
        finally:
            self._reserved -= count
            self._mean_seconds += 0.1 * (time.perf_counter() - began - self._mean_seconds)

    async def run(
        self,
        prompts: Sequence[Sequence[int]],
        generation_config: GenerationConfig,
        arrived: float,
        strategy: Strategy | None = None,
        adapter: int = 0,
    ) -> AsyncGenerator[JobOutput, None]:
        """Outputs of all continuations until the last has ended; close it early and they are cancelled.

        Raises:
            ApiError: 400 for what the engine refuses, 503 if the wait is too long or the engine fails, 504 if the
                whole request takes too long.
        """
        job = Job(arrived, len(prompts) * generation_config.num_samples, REQUEST_ID.get())
        self._send(lambda: self._submit(job, prompts, generation_config, strategy, adapter))
        self._jobs.add(job)
        try:
            while job.open:
                output = await self._next(job)
                if isinstance(output, ApiError):
                    raise output
                job.open -= output[1].finish_reason is not None
                yield output
        finally:
            self._jobs.discard(job)
            if job.open:
                with suppress(ApiError):
                    self._send(lambda: self._cancel(job))
            self.metrics.end_to_end.observe(time.perf_counter() - arrived)

    async def _next(self, job: Job) -> JobOutput | ApiError:
        """The job's next output, within `queue_seconds` of waiting and `request_seconds` in all."""
        limits = self.limits
        waiting = job.started is None and limits.queue_seconds < limits.request_seconds
        left = job.arrived + (limits.queue_seconds if waiting else limits.request_seconds) - time.perf_counter()
        try:
            async with asyncio.timeout(left):
                return await job.outputs.get()
        except TimeoutError:
            if waiting and job.started is not None:
                return await self._next(job)
        if waiting:
            raise ApiError(503, "no slot became free in time", code="queue_timeout", headers={"Retry-After": "5"})
        # a second try would take as long: OpenAI's client honours this header
        raise ApiError(504, "the request took too long", code="request_timeout", headers={"x-should-retry": "false"})

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self.stop_reason is not None:
                raise ApiError(503, "the engine is dead: restart the server", code="engine_dead")
            self._inbox.put(command)

    def _deliver(self, batch: list[tuple[Job, int, Output]], now: float) -> None:
        """Put a step's outputs into the queues of their jobs, and count them."""
        for job, prompt, output in batch:
            self._count(job, prompt, output, now)
            if output.finish_reason is not None:
                self.metrics.finished.labels(output.finish_reason).inc()
            job.outputs.put_nowait((prompt, output))

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
                self._run_commands(wait=not self.engine.has_work)
                if self.engine.has_work and not self._ended:
                    self._send_outputs(self.engine.step())
        except BaseException as error:
            log.error("the engine died: %s", failure_location(error))
            self.failed = True
            self._end("the engine failed: restart the server")

    def _run_commands(self, wait: bool) -> None:
        """Run the commands that the event loop has sent; with `wait`, wait for the first."""
        if wait:
            self._inbox.get()()
        while not self._ended:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                return
            command()

    def _submit(
        self,
        job: Job,
        prompts: Sequence[Sequence[int]],
        generation_config: GenerationConfig,
        strategy: Strategy | None,
        adapter: int,
    ) -> None:
        try:
            for i, ids in enumerate(prompts):
                engine_id = self.engine.submit(ids, generation_config, strategy=strategy, adapter=adapter)
                job.engine_ids.append(engine_id)
                self._prompts[engine_id] = EnginePrompt(job, i, generation_config.num_samples)
                self._unstarted.add(engine_id)
        except UserError as error:
            self._refuse(job, bad_request(str(error)))
        except Exception as error:  # of this request alone: `Engine.submit` leaves nothing behind
            log.error("request=%s could not be submitted: %s", job.request_id, failure_location(error))
            self._refuse(job, ApiError(500, "the server failed: its log has the request id", code="generation_failed"))

    def _refuse(self, job: Job, error: ApiError) -> None:
        """Cancel what the job has in the engine, and end it with `error`."""
        self._cancel(job)
        self._post(lambda: job.outputs.put_nowait(error))

    def _cancel(self, job: Job) -> None:
        for engine_id in job.engine_ids:
            self._unstarted.discard(engine_id)
            if self._prompts.pop(engine_id, None) is not None:
                self.engine.cancel(engine_id)

    def _send_outputs(self, outputs: list[Output]) -> None:
        """Send one step's outputs to the event loop, in one batch."""
        now = time.perf_counter()
        if self._unstarted:
            self._mark_started(now)
        self.metrics.prefix_hits.inc(max(0, self.engine.slots.reused - self._reused))
        self._reused = self.engine.slots.reused
        batch = []
        for output in outputs:
            prompt = self._prompts.get(output.request)
            if prompt is None:  # cancelled
                continue
            batch.append((prompt.job, prompt.index, output))
            if output.finish_reason == "error":
                text = "request=%s failed in the engine as its request %d: %s"
                log.error(text, prompt.job.request_id, output.request, output.error)
            prompt.open -= output.finish_reason is not None
            if not prompt.open:
                del self._prompts[output.request]
        if batch:
            self._post(lambda: self._deliver(batch, now))

    def _mark_started(self, now: float) -> None:
        """Set `started` of jobs that have left the engine's queue: `queue_seconds` no longer limits them."""
        for engine_id in self._unstarted - self.engine.waiting:
            self._unstarted.remove(engine_id)
            job = self._prompts[engine_id].job
            if job.started is None:
                job.started = now
                self.metrics.queue_time.observe(now - job.arrived)

    def _post(self, callback: Callable[[], None]) -> None:
        """Run `callback` on the event loop."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: no request is open any more
            self._loop.call_soon_threadsafe(callback)

    def _end(self, reason: str) -> None:
        """Fail all jobs with 503 and accept no more commands."""
        self._ended = True
        with self._lock:
            self.stop_reason = reason
            while not self._inbox.empty():
                self._inbox.get_nowait()
        self._prompts.clear()
        failure = ApiError(503, reason, code="engine_dead")

        def fail_all() -> None:  # those, too, whose commands the engine has not come to
            for job in self._jobs:
                job.outputs.put_nowait(failure)

        self._post(fail_all)
