"""The model runner: one forward pass for all sequences of a batch, and each request's share of the result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.prefix_cache import PrefixCache
from lit_gpt.generation.slots import CachedSequence, PromptResult, SlotManager
from lit_gpt.model.config import GPTConfig


class Adapters(Protocol):
    """The adapters of a model, of which each row of a forward pass has one, or none."""

    count: int

    def select(self, rows: Sequence[int]) -> None:
        """Compute row i of the next passes with adapter `rows[i]`, from 1 to `count`; 0 for the model itself."""


class ModelRunner:
    """One model and its cache.

    Attributes:
        model: called as `GPT.forward` is; it writes its keys and values into the slots.
        slots: the slots of its cache.
        prefix_cache: reuse of what they hold.
        n_vocab: V; logits beyond it are dropped.
        device: of the model.
        forwards: forward passes so far.
        fed: tokens computed so far, padding not counted.
        adapters: of the model, if it has any.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: GPTConfig,
        *,
        n_slot: int,
        n_vocab: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        adapters: Adapters | None = None,
    ) -> None:
        self.model = model
        self.adapters = adapters
        self.slots = SlotManager(config, n_slot, dtype, device)
        self.prefix_cache = PrefixCache(self.slots)
        self.n_vocab = n_vocab
        self.device = torch.device(device)
        self.forwards = 0
        self.fed = 0

    def run(self, batch: list[ForwardRequest]) -> list[ForwardRequest]:
        """Compute the scheduled tokens of every request in one pass; the requests that are done with it."""
        cache = self.slots.cache
        batch.sort(key=lambda request: request.sequence.slot)  # in order, a run of slots is read as one slice
        slots = [request.sequence.slot for request in batch]
        counts = [request.num_scheduled for request in batch]
        longest = max(counts)
        ids = [self._next_ids(request.sequence, n, longest) for request, n in zip(batch, counts)]
        idx = torch.tensor(ids, device=self.device)
        step = cache.step(slots, longest)
        one_each = all(request.num_logits == 1 for request in batch)
        last_only: bool | Tensor = False
        if longest > 1 and one_each:
            ragged = len(set(counts)) > 1
            last_only = torch.tensor([n - 1 for n in counts], device=self.device) if ragged else True
        hidden = any(request.hidden for request in batch)
        if self.adapters is not None:
            self.adapters.select([request.sequence.adapter for request in batch])
        output = self.model(idx, cache=step, last_only=last_only, return_hidden=hidden)
        logits, states = output.logits[..., : self.n_vocab], output.hidden
        if logits.dtype in (torch.bfloat16, torch.float16):
            logits = logits.float()
            states = None if states is None else states.float()
        cache.extend(slots, counts)
        self.forwards += 1
        self.fed += sum(counts)
        return self._hand_out(batch, [1] * len(batch) if one_each else counts, logits, states)

    def _next_ids(self, sequence: CachedSequence, n: int, width: int) -> list[int]:
        """The next `n` ids of `sequence`, padded to `width`."""
        first = sequence.start + self.slots.computed(sequence)
        return sequence.ids[first : first + n] + [0] * (width - n)

    def _hand_out(
        self, batch: list[ForwardRequest], ends: list[int], logits: Tensor, states: Tensor | None
    ) -> list[ForwardRequest]:
        """Give requests that are done theirs of the (B, T, V) logits and states, of which row i ends at `ends[i]`."""
        done = []
        for i, (request, end) in enumerate(zip(batch, ends)):
            sequence = request.sequence
            if self.slots.pending(sequence):
                continue
            request.logits, request.done = logits[i, end - request.num_logits : end], True
            if request.hidden and states is not None:
                request.states = states[i, end - request.num_logits : end]
            if sequence.reuse and sequence.start == 0 and not request.tokens:
                last = None if states is None else states[i, end - 1].clone()
                sequence.end_of_prompt = PromptResult(len(sequence.ids), logits[i, end - 1].clone(), last)
            done.append(request)
        return done
