"""The engine: requests in, tokens out. It knows no HTTP and no Lightning, and takes any model with GPT's call.

    engine = Engine(model, config, tokenizer)
    request = engine.submit(ids, GenerationConfig(max_new_tokens=20))
    while engine.has_work:
        for output in engine.step():
            ...

A step is schedule → run → postprocess: the scheduler says which requests of which generations are computed, the model
runner computes them in one forward pass for all that decode and one for a chunk of prompts, and what comes of it is
chosen from and handed to the strategies. Strategies are coroutines that yield what to compute: no other generation
loop exists.

Whatever a strategy, a sampler or an observer raises ends the generation that it belongs to, with finish_reason `error`.
Only what fails for all of a batch, the forward pass and the bookkeeping of slots, is raised by `step`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation, Request, Resources, Strategy, Value
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.model_runner import Adapters, ModelRunner
from lit_gpt.generation.outputs import Output
from lit_gpt.generation.prompts import check_ids, check_prompt, vocabulary_size
from lit_gpt.generation.sampling import NONE, Observer, Sampler, choose_tokens
from lit_gpt.generation.scheduler import Schedule, Scheduler
from lit_gpt.generation.slots import SlotManager, slots_for_memory
from lit_gpt.generation.stopping import Ending
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import Tokenizer


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
        scheduler: the generations that wait and run.
        model_runner: the model, and counts of what it computed.
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
        adapters: Adapters | None = None,
    ) -> None:
        """An engine over `model`, which must be in eval mode.

        Args:
            model: called as `GPT.forward` is: `model(idx, cache=, last_only=, return_hidden=)`.
            config: its shape.
            tokenizer: for text, stop strings and end-of-text.
            draft: what proposes tokens to `speculative` requests whose `draft` is not "ngram".
            max_slots: slots of the cache; None for what half of the free memory holds, at most 64 (256 on a GPU).
            prefill_chunk: tokens of prompts in one pass: how long the others wait at most.
            dtype: of the cache; None for the model's.
            device: of the model; None for its weights'.
            adapters: of the model, for requests that name one.

        Raises:
            UserError: for a draft with another tokenizer or vocabulary.
        """
        found_device, found_dtype = _device_and_dtype(model)
        device, dtype = torch.device(device or found_device), dtype or found_dtype
        self.config = config
        self.tokenizer = tokenizer
        self._n_vocab = vocabulary_size(config, tokenizer)
        n_slot = max_slots or slots_for_memory(config, dtype, device)
        self.scheduler = Scheduler(n_slot, prefill_chunk)
        options = {"n_slot": n_slot, "n_vocab": self._n_vocab, "dtype": dtype, "device": device}
        self.model_runner = ModelRunner(model, config, **options, adapters=adapters)  # type: ignore[arg-type]
        self._draft_runner = None if draft is None else self._make_draft_runner(draft)
        self.observer: Observer | None = None
        self._outbox: list[Output] = []
        self._n_requests = 0

    def _make_draft_runner(self, draft: Draft) -> ModelRunner:
        check_draft(draft, self.config, self.tokenizer)
        device, dtype = _device_and_dtype(draft.model)
        n_slot = self.slots.n_slot
        return ModelRunner(draft.model, draft.config, n_slot=n_slot, n_vocab=self._n_vocab, dtype=dtype, device=device)

    # --- requests -------------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt_ids: Sequence[int],
        generation_config: GenerationConfig,
        value: Value | None = None,
        strategy: Strategy | None = None,
        adapter: int = 0,
    ) -> int:
        """Queue a request.

        Args:
            prompt_ids: the prompt; none to start from end-of-text.
            generation_config: its settings.
            value: rates texts for `mcts`; None for the model's own likelihood.
            strategy: a strategy of the caller's own; None for the one that `generation_config` names.
            adapter: which of the model's adapters computes it, from 1; 0 for none.

        Returns:
            Its id, which its outputs carry.

        Raises:
            UserError: for settings that are wrong, do not go together, or do not fit this model.
        """
        prompt = self._check(prompt_ids, generation_config)
        adapters = self.model_runner.adapters
        if not 0 <= adapter <= (0 if adapters is None else adapters.count):
            raise UserError(f"the model has no adapter {adapter}: load it first")
        self._n_requests += 1
        ending = self._ending(prompt, generation_config)
        strategy = strategy or generation_config.spec.load()
        request = Request(self._n_requests, prompt, generation_config, ending, strategy, value, adapter)
        draft = None if generation_config.draft_checkpoint is None else self._draft_runner
        resources = Resources(self.slots, None if draft is None else draft.slots, self.tokenizer, self._n_vocab)
        seed = generation_config.seed if generation_config.seed is not None else int.from_bytes(os.urandom(4), "little")
        samplers = [self._sampler(request, seed + index) for index in range(generation_config.generations)]
        generations = [Generation(request, resources, sampler=each, index=i) for i, each in enumerate(samplers)]
        for generation in generations:  # all or none: whatever fails above leaves nothing behind
            self.scheduler.add(generation)
        return request.id

    def _ending(self, prompt: list[int], generation_config: GenerationConfig) -> Ending:
        limit = generation_config.max_new_tokens
        if generation_config.overflow == "stop":
            limit = min(limit, self.config.block_size - len(prompt))
        return Ending(generation_config, limit, frozenset(generation_config.stop_token_ids) | self._eot_ids())

    def _sampler(self, request: Request, seed: int) -> Sampler:
        end_ids, device = request.ending.end_ids, self.model_runner.device
        sampler = Sampler(
            request.generation_config, request.prompt, self._n_vocab, end_ids, self._eot_ids(), seed, device
        )
        sampler.observer = self.observer
        return sampler

    def cancel(self, request: int) -> None:
        """End a request; what it has written so far comes with the next step, with finish_reason "cancelled"."""
        for generation in self._generations():
            if generation.request_id == request:
                generation.stop("cancelled")
                self._outbox += generation.contained_outputs()
                self.scheduler.remove(generation)

    def cancel_all(self) -> None:
        """Drop everything, outputs that nobody has received included."""
        for request in {generation.request_id for generation in self._generations()}:
            self.cancel(request)
        self._outbox.clear()

    def _generations(self) -> list[Generation]:
        return [*self.scheduler.waiting, *self.scheduler.running]

    @property
    def slots(self) -> SlotManager:
        """The slots of the model's cache."""
        return self.model_runner.slots

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.waiting or self.scheduler.running or self._outbox)

    @property
    def n_running(self) -> int:
        """Generations that hold slots."""
        return len(self.scheduler.running)

    @property
    def n_waiting(self) -> int:
        """Generations that wait for slots."""
        return len(self.scheduler.waiting)

    @property
    def waiting(self) -> set[int]:
        """Requests of which a generation still waits for slots."""
        return {generation.request_id for generation in self.scheduler.waiting}

    def drain(self) -> Iterator[Output]:
        """Step until nothing is left to do."""
        while self.has_work:
            yield from self.step()

    # --- the core loop --------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[Output]:
        """Schedule, run, postprocess: what is new of every continuation that has anything new."""
        self.scheduler.admit()
        if self._draft_runner is not None:  # the draft goes on until all wait for the model
            while schedule := self.scheduler.schedule(self._draft_runner):
                self._postprocess(self._run(self._draft_runner, schedule))
        if schedule := self.scheduler.schedule(self.model_runner):
            self._postprocess(self._run(self.model_runner, schedule))
        return self._outputs()

    def _run(self, runner: ModelRunner, schedule: Schedule) -> list[list[ForwardRequest]]:
        """The requests that are done now, in groups of one forward pass each."""
        return [schedule.known, *(runner.run(batch) for batch in schedule.batches)]

    def _postprocess(self, groups: list[list[ForwardRequest]]) -> None:
        """Choose tokens from the logits; generations that have all they waited for go on."""
        for requests in groups:
            if requests:
                self._choose(self._without_failures(requests))
        for generation in self.scheduler.running:
            if generation.forward_requests and all(request.done for request in generation.forward_requests):
                generation.resume()

    def _outputs(self) -> list[Output]:
        outputs, self._outbox = self._outbox, []
        for generation in self.scheduler.running:
            outputs += generation.contained_outputs()
        self.scheduler.drop_closed()
        return outputs

    def _without_failures(self, requests: list[ForwardRequest]) -> list[ForwardRequest]:
        """Stop the generations whose logits are no numbers; the requests of the others."""
        peaks = torch.stack([request.logits.amax() for request in requests])  # the largest is NaN if any is
        if bool(peaks.isfinite().all()):
            return requests
        failed = [request for request, fine in zip(requests, peaks.isfinite().tolist()) if not fine]
        self._stop(failed, "the model's logits are not finite (NaN or infinity) at")
        return [request for request in requests if request not in failed]

    def _stop(self, requests: list[ForwardRequest], what: str) -> None:
        """Stop the generations that wait for `requests`; the others go on."""
        for generation in self.scheduler.running:
            if any(request in requests for request in generation.forward_requests):
                generation.stop("error", f"{what} {generation.position}")

    def _choose(self, requests: list[ForwardRequest]) -> None:
        """Decide the next token of every request that asks for it, all at once."""
        requests = [request for request in requests if request.sampler is not None]
        if not requests:
            return
        if len(requests) == 1:
            logits = requests[0].logits[-1:]
        else:
            logits = torch.stack([request.logits[-1] for request in requests])
        samplers = [request.sampler for request in requests if request.sampler is not None]
        try:
            choices = choose_tokens(samplers, logits)
        except Exception:  # of one of them: each alone shows of which
            choices = [self._choose_alone(request, row) for request, row in zip(requests, logits)]
        for request, token in zip(requests, choices):
            request.choice = token
        failed = [request for request in requests if request.choice == NONE]
        if failed:
            self._stop(failed, "the settings forbid every token, or make the logits overflow, at")

    def _choose_alone(self, request: ForwardRequest, logits: Tensor) -> int:
        """The next token from (V,) logits, or `NONE`, its generation having failed."""
        assert request.sampler is not None
        try:
            return choose_tokens([request.sampler], logits[None])[0]
        except Exception as error:
            for generation in self.scheduler.running:
                if request in generation.forward_requests:
                    generation.fail(error)
            return NONE

    # --- checks ---------------------------------------------------------------------------------------------------

    def _eot_ids(self) -> frozenset[int]:
        eot = None if self.tokenizer is None else self.tokenizer.eot_id
        return frozenset() if eot is None else frozenset([eot])

    def _check(self, prompt_ids: Sequence[int], generation_config: GenerationConfig) -> list[int]:
        """The prompt, which is end-of-text if it was empty."""
        generation_config.check()
        for name in ("banned_tokens", "logit_bias", "stop_token_ids"):
            check_ids(name, list(getattr(generation_config, name)), self._n_vocab)
        prompt = check_prompt("the prompt", prompt_ids, self.config, generation_config, self.tokenizer)
        if generation_config.stops and self.tokenizer is None:
            raise UserError("stop strings need a tokenizer, and this model came without one: use stop_token_ids")
        if generation_config.sequences > self.slots.n_slot:
            raise UserError(
                f"{generation_config.strategy} needs {generation_config.sequences} slots of cache and there are "
                f"{self.slots.n_slot}: lower {generation_config.spec.sequences}"
            )
        if generation_config.draft_checkpoint is not None and self._draft_runner is None:
            raise UserError(
                f"the draft {generation_config.draft} was not loaded: use draft ngram, or give the engine a draft"
            )
        return prompt


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


def _device_and_dtype(model: Any) -> tuple[torch.device, torch.dtype]:
    """Device of a module's weights and dtype of its cache; fp32 on the CPU for what has none."""
    for parameter in model.parameters() if isinstance(model, torch.nn.Module) else ():
        if parameter.is_floating_point():
            return parameter.device, getattr(model, "cache_dtype", parameter.dtype)
    return torch.device("cpu"), torch.float32
