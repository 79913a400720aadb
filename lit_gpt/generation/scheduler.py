"""The scheduler: which generations run, and which tokens of which requests the next forward passes compute."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation
from lit_gpt.generation.model_runner import ModelRunner
from lit_gpt.generation.slots import SlotManager

_VERIFY = 16
"""Requests of up to this many tokens, all of whose logits are wanted, share the decode pass of the others."""


class Schedule(NamedTuple):
    """What one step does for one model.

    Attributes:
        known: requests whose result the prefix cache had: they are done.
        batches: requests for one forward pass each.
    """

    known: list[ForwardRequest]
    batches: list[list[ForwardRequest]]


class Scheduler:
    """Continuous batching: a generation starts when the slots it may need are free, and leaves when it ends.

    Attributes:
        n_slot: slots of the cache.
        prefill_chunk: tokens of prompts in one forward pass.
        waiting: generations that wait for slots, in their order.
        running: generations that hold slots.
    """

    def __init__(self, n_slot: int, prefill_chunk: int = 512) -> None:
        self.n_slot = n_slot
        self.prefill_chunk = prefill_chunk
        self.waiting: deque[Generation] = deque()
        self.running: list[Generation] = []

    # --- generations ----------------------------------------------------------------------------------------------

    def add(self, generation: Generation) -> None:
        """Queue a generation."""
        self.waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Drop a generation, wherever it is."""
        (self.waiting if generation in self.waiting else self.running).remove(generation)

    def admit(self) -> None:
        """Start generations in their order while the slots they may need are free: none runs out half-way."""
        if not self.waiting:
            return
        needed = sum(generation.generation_config.sequences for generation in self.running)
        while self.waiting and needed + self.waiting[0].generation_config.sequences <= self.n_slot:
            generation = self.waiting.popleft()
            needed += generation.generation_config.sequences
            self.running.append(generation)
            generation.start()

    def drop_closed(self) -> None:
        """Forget the generations that have ended."""
        self.running = [generation for generation in self.running if not generation.closed]

    # --- forward passes -------------------------------------------------------------------------------------------

    def schedule(self, runner: ModelRunner) -> Schedule | None:
        """What to compute now of what is asked of one model; None if nothing is.

        All requests for one token, and verifications, are computed now, in as few passes as they fit into; of prompts
        it is one chunk.
        """
        slots = runner.slots
        requests = [
            request
            for generation in self.running
            for request in generation.forward_requests
            if not request.done and request.sequence.manager is slots
        ]
        if not requests:
            return None
        known, rest = runner.prefix_cache.reuse(requests)
        decode, prefill = self._split(slots, rest)
        batches = []
        while decode:
            batch, decode = self._fitting(slots, decode)
            slots.make_contiguous([request.sequence for request in batch])
            batches.append(batch)
        if prefill:
            batches.append(self._fitting(slots, prefill, budget=self.prefill_chunk)[0])
        return Schedule(known, batches)

    def _split(
        self, slots: SlotManager, requests: list[ForwardRequest]
    ) -> tuple[list[ForwardRequest], list[ForwardRequest]]:
        """The requests of the decode passes, and of the prefill pass, each with its number of tokens."""
        decode, prefill = [], []
        for request in requests:
            pending = slots.pending(request.sequence)
            if pending <= min(request.num_logits, _VERIFY):
                request.num_scheduled = pending
                decode.append(request)
            else:
                request.num_scheduled = self._next_chunk(request, pending)
                prefill.append(request)
        return decode, prefill

    def _next_chunk(self, request: ForwardRequest, pending: int) -> int:
        """How many of `pending` tokens to compute next; those whose logits are wanted stay together."""
        chunk = max(self.prefill_chunk, request.num_logits)
        return pending if pending <= chunk else min(chunk, pending - request.num_logits)

    def _fitting(
        self, slots: SlotManager, requests: list[ForwardRequest], budget: int | None = None
    ) -> tuple[list[ForwardRequest], list[ForwardRequest]]:
        """Split off the requests that can share one forward pass with the first.

        Shorter ones are padded on the right to the longest, and the padding must fit into their slots. A prompt joins
        only while the padded pass stays within `budget` tokens and at least half of it is no padding.
        """
        batch: list[ForwardRequest] = []
        others: list[ForwardRequest] = []
        longest = total = reach = 0
        for request in requests:
            count = request.num_scheduled
            width = max(longest, count)
            far = max(reach, slots.computed(request.sequence))
            size = width * (len(batch) + 1)
            fits = far + width <= slots.capacity
            if budget is not None:
                fits = fits and size <= budget and size <= 2 * (total + count)
            if batch and not fits:
                others.append(request)
                continue
            batch.append(request)
            longest, total, reach = width, total + count, far
        return batch, others
