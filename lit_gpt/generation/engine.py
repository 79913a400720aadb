"""The engine: requests in, tokens out. It knows no HTTP and no Lightning, and takes any model with GPT's call.

    engine = Engine(model, config, tokenizer)
    request = engine.submit(ids, GenerationConfig(max_new_tokens=20))
    while engine.has_work:
        for output in engine.step():
            ...

A step is one forward pass for all running requests that are writing, and one for a chunk of a prompt that is being
read. A request joins when there are rows for it and leaves when it ends. Strategies are coroutines that yield what to
feed: no other generation loop exists.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lit_gpt.errors import UserError
from lit_gpt.generation.generation import Generation, Strategy, Value
from lit_gpt.generation.generation_config import NGRAM, GenerationConfig
from lit_gpt.generation.outputs import Output
from lit_gpt.generation.rows import ForwardRequest, Rows
from lit_gpt.generation.sampling import NONE, Observer, Sampler, choose_tokens
from lit_gpt.generation.stopping import Ending
from lit_gpt.generation.strategies.beam import beam
from lit_gpt.generation.strategies.contrastive import contrastive
from lit_gpt.generation.strategies.mcts import mcts
from lit_gpt.generation.strategies.sample import sample
from lit_gpt.generation.strategies.speculative import speculative
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.kv_cache import KVCache
from lit_gpt.tokenizer.tokenizer import Tokenizer

STRATEGIES: dict[str, Strategy] = {
    "sample": sample,
    "greedy": sample,
    "beam": beam,
    "contrastive": contrastive,
    "mcts": mcts,
    "speculative": speculative,
}

_CACHE_SHARE = 0.5
"""Share of the free memory that the cache may take; the rest is for activations and everybody else."""

_MOST_SLOTS = {"cpu": 64, "cuda": 256}
"""More rows than this in one pass no longer make it cheaper per row."""


class Draft(NamedTuple):
    """A smaller model that proposes tokens to `speculative`."""

    model: Any
    config: GPTConfig
    tokenizer: Tokenizer | None = None


class Engine:
    """Continuous batching over a preallocated cache.

    Attributes:
        config: the model's shape.
        tokenizer: None for bare ids; texts are then empty and stop strings refused.
        rows: rows of the cache, and counts of what was computed.
        observer: told of every token that is decided on, if not None.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        config: GPTConfig,
        tokenizer: Tokenizer | None = None,
        *,
        draft: Draft | None = None,
        max_slots: int | None = None,
        prefill_chunk: int = 512,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An engine over `model`, which must be in eval mode.

        Args:
            model: called as `GPT.forward` is: `model(idx, cache=, last_only=, return_hidden=)`.
            config: its shape.
            tokenizer: for text, stop strings and end-of-text.
            draft: what proposes tokens to `speculative` requests whose `draft` is not "ngram".
            max_slots: rows of the cache; None for what half of the free memory holds, at most 64 (256 on a GPU).
            prefill_chunk: tokens of prompts in one pass: how long the others wait at most.
            dtype: of the cache; None for the model's.
            device: of the model; None to look.

        Raises:
            UserError: for a draft with another tokenizer or vocabulary.
        """
        found_dtype, found_device = _whereabouts(model)
        dtype, device = dtype or found_dtype, torch.device(device or found_device)
        self.config = config
        self.tokenizer = tokenizer
        self._n_vocab = config.vocab_size if tokenizer is None else min(config.vocab_size, tokenizer.n_vocab)
        slots = max_slots or slots_for_memory(config, dtype, device)
        self.rows = Rows(model, config, slots, self._n_vocab, dtype, device, prefill_chunk)
        self._draft: Rows | None = None
        if draft is not None:
            check_draft(draft, config, tokenizer)
            kind, place = _whereabouts(draft.model)
            self._draft = Rows(draft.model, draft.config, slots, self._n_vocab, kind, place, prefill_chunk)
        self.observer: Observer | None = None
        self._queue: deque[Generation] = deque()
        self._generations: list[Generation] = []
        self._outbox: list[Output] = []
        self._requests = 0

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        generation_config: GenerationConfig,
        value: Value | None = None,
        strategy: Strategy | None = None,
    ) -> int:
        """Queue a request.

        Args:
            prompt_ids: the prompt; none to start from end-of-text.
            generation_config: its settings.
            value: rates texts for `mcts`; None for the model's own likelihood.
            strategy: a strategy of the caller's own; None for the one that `generation_config` names.

        Returns:
            Its id, which its outputs carry.

        Raises:
            UserError: for settings that are wrong, do not go together, or do not fit this model.
        """
        prompt = self._check(list(prompt_ids), generation_config)
        self._requests += 1
        seed = generation_config.seed if generation_config.seed is not None else int.from_bytes(os.urandom(4), "little")
        end_ids = frozenset(generation_config.stop_token_ids) | self._eot_ids()
        limit = generation_config.max_new_tokens
        if generation_config.overflow == "stop":
            limit = min(limit, self.config.block_size - len(prompt))
        ending = Ending(generation_config, limit, end_ids)
        for index in range(generation_config.continuations):
            sampler = Sampler(
                generation_config, prompt, self._n_vocab, end_ids, self._eot_ids(), seed + index, self.rows.device
            )
            sampler.observer = self.observer
            self._queue.append(
                Generation(
                    self._requests,
                    index,
                    prompt,
                    generation_config,
                    self.rows,
                    ending,
                    sampler,
                    strategy or STRATEGIES[generation_config.strategy],
                    self.tokenizer,
                    self._draft if generation_config.draft != NGRAM else None,
                    value,
                )
            )
        return self._requests

    def cancel(self, request: int) -> None:
        """End a request; what it has written so far comes with the next step, with finish_reason "cancelled"."""
        for generation in [
            generation for generation in (*self._queue, *self._generations) if generation.request == request
        ]:
            generation.stop("cancelled")
            self._outbox += generation.news()
            (self._queue if generation in self._queue else self._generations).remove(generation)

    def cancel_all(self) -> None:
        """Drop everything, outputs that nobody has taken included."""
        for request in {generation.request for generation in (*self._queue, *self._generations)}:
            self.cancel(request)
        self._outbox.clear()

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._queue or self._generations or self._outbox)

    @property
    def n_running(self) -> int:
        """Continuations that hold rows."""
        return len(self._generations)

    @property
    def n_waiting(self) -> int:
        """Continuations that wait for rows."""
        return len(self._queue)

    @property
    def waiting(self) -> set[int]:
        """Requests of which something still waits for rows."""
        return {generation.request for generation in self._queue}

    def drain(self) -> Iterator[Output]:
        """Step until nothing is left to do."""
        while self.has_work:
            yield from self.step()

    # --- the core loop --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Schedule, compute, hand out: the news of every continuation that has any."""
        self._admit()
        if self._draft is not None:
            while feeds := self._waiting_for(self._draft):
                self._advance(self._draft, feeds)
        if feeds := self._waiting_for(self.rows):
            self._advance(self.rows, feeds)
        outputs, self._outbox = self._outbox, []
        for generation in self._generations:
            outputs += generation.news()
        self._generations = [generation for generation in self._generations if not generation.closed]
        return outputs

    def _admit(self) -> None:
        """Start requests in their order while the rows they may need are there: none runs out half-way."""
        taken = sum(generation.generation_config.rows for generation in self._generations)
        while self._queue and taken + self._queue[0].generation_config.rows <= self.rows.n_row:
            generation = self._queue.popleft()
            taken += generation.generation_config.rows
            self._generations.append(generation)
            generation.start()

    def _waiting_for(self, rows: Rows) -> list[ForwardRequest]:
        return [
            feed
            for generation in self._generations
            for feed in generation.feeds
            if not feed.done and feed.row.home is rows
        ]

    def _advance(self, rows: Rows, feeds: list[ForwardRequest]) -> None:
        """One step of `rows`; runs that have all they waited for go on."""
        for group in rows.work(feeds):
            self._choose(self._without_failures(group))
        for generation in self._generations:
            if generation.feeds and all(feed.done for feed in generation.feeds):
                generation.resume()

    def _without_failures(self, feeds: list[ForwardRequest]) -> list[ForwardRequest]:
        """Stop the runs whose logits are no numbers; the feeds of the others."""
        peaks = torch.stack([feed.logits.amax() for feed in feeds])  # the largest is NaN if any is
        if bool(peaks.isfinite().all()):
            return feeds
        failed = [feed for feed, fine in zip(feeds, peaks.isfinite().tolist()) if not fine]
        self._stop(failed, "the model's logits are not finite (NaN or infinity) at")
        return [feed for feed in feeds if feed not in failed]

    def _stop(self, feeds: list[ForwardRequest], what: str) -> None:
        """Stop the runs that wait for `feeds`; the others go on."""
        for generation in self._generations:
            if any(feed in feeds for feed in generation.feeds):
                generation.stop("error", f"{what} {generation.place}")

    def _choose(self, feeds: list[ForwardRequest]) -> None:
        """Decide the next token of every feed that asks for it, all at once."""
        feeds = [feed for feed in feeds if feed.sampler is not None]
        if not feeds:
            return
        logits = feeds[0].logits[-1:] if len(feeds) == 1 else torch.stack([feed.logits[-1] for feed in feeds])
        for feed, token in zip(
            feeds, choose_tokens([feed.sampler for feed in feeds if feed.sampler is not None], logits)
        ):
            feed.choice = token
        failed = [feed for feed in feeds if feed.choice == NONE]
        if failed:
            self._stop(failed, "the settings forbid every token, or make the logits overflow, at")

    # --- checks ---------------------------------------------------------------------------------------------------

    def _eot_ids(self) -> frozenset[int]:
        eot = None if self.tokenizer is None else self.tokenizer.eot_id
        return frozenset() if eot is None else frozenset([eot])

    def _check(self, prompt: list[int], generation_config: GenerationConfig) -> list[int]:
        """The prompt, which is end-of-text if it was empty."""
        generation_config.check()
        if not prompt and not self._eot_ids():
            raise UserError("the prompt is empty and the tokenizer has no end-of-text to start from: write a prompt")
        prompt = prompt or list(self._eot_ids())
        for name in ("banned_tokens", "logit_bias", "stop_token_ids"):
            _check_ids(f"{name} has", list(getattr(generation_config, name)), self._n_vocab)
        _check_ids("the prompt has", prompt, self.config.vocab_size)
        if generation_config.overflow == "stop" and len(prompt) > self.config.block_size:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, the model's context is {self.config.block_size}: "
                f"shorten it, or use overflow slide"
            )
        if generation_config.stops and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model came without one: use stop_token_ids")
        if generation_config.rows > self.rows.n_row:
            raise UserError(
                f"{generation_config.strategy} needs {generation_config.rows} rows of cache and there are "
                f"{self.rows.n_row}: "
                f"lower {'num_beams' if generation_config.strategy == 'beam' else 'top_k'}"
            )
        if generation_config.strategy == "speculative" and generation_config.draft != NGRAM and self._draft is None:
            raise UserError(
                f"the draft {generation_config.draft} was not loaded: use draft ngram, or give the engine a draft"
            )
        return prompt


def _check_ids(what: str, ids: list[int], n_vocab: int) -> None:
    if ids and (min(ids) < 0 or max(ids) >= n_vocab):
        wrong = min(ids) if min(ids) < 0 else max(ids)
        raise UserError(f"{what} token id {wrong}, outside the vocabulary of {n_vocab}: use ids 0 … {n_vocab - 1}")


def check_draft(draft: Draft, config: GPTConfig, tokenizer: Tokenizer | None) -> None:
    """Refuse a draft whose ids mean something else. Raises UserError."""
    if tokenizer is not None and draft.tokenizer is not None and tokenizer.hash != draft.tokenizer.hash:
        raise UserError(
            f'the draft\'s tokenizer is "{draft.tokenizer.name}", the model\'s is "{tokenizer.name}", and they differ: '
            f"use a draft with the same tokenizer"
        )
    if draft.config.vocab_size != config.vocab_size:
        raise UserError(
            f"the draft has {draft.config.vocab_size} token ids, the model {config.vocab_size}: "
            f"use a draft with the same tokenizer"
        )


def _whereabouts(model: Any) -> tuple[torch.dtype, torch.device]:
    """Dtype of a module's cache and device of its weights; fp32 on the CPU for what has none."""
    for parameter in model.parameters() if isinstance(model, torch.nn.Module) else ():
        if parameter.is_floating_point():
            return getattr(model, "cache_dtype", parameter.dtype), parameter.device
    return torch.float32, torch.device("cpu")


def slots_for_memory(config: GPTConfig, dtype: torch.dtype, device: torch.device | str) -> int:
    """Rows of `block_size` tokens that half of the free memory holds; at least one, at most 64 (256 on a GPU)."""
    device = torch.device(device)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _free_memory()
    rows = int(free * _CACHE_SHARE) // KVCache.bytes_per_slot(config, config.block_size, dtype)
    return max(1, min(rows, _MOST_SLOTS.get(device.type, _MOST_SLOTS["cpu"])))


def _free_memory() -> int:
    """Bytes that can be had without swapping."""
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux: half of all there is
        try:
            return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
        except (ValueError, OSError, AttributeError):
            return 4 << 30
