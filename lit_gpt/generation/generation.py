"""One generation: a strategy at work, the operations that it has, and the tokens that it decides on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import FinishReason, Output, Token
from lit_gpt.generation.sampling import Sampler, ranked
from lit_gpt.generation.slots import CachedSequence, SlotManager
from lit_gpt.generation.stopping import Continuation, Ending
from lit_gpt.tokenizer.ids import id_outside
from lit_gpt.tokenizer.tokenizer import Tokenizer

log = logging.getLogger("lit_gpt.generation")

Result = TypeVar("Result")

ForwardSteps = Generator[list[ForwardRequest], list[ForwardRequest], Result]
"""A part of a strategy: yields what to compute, is resumed with the same requests once all are done."""

StrategySteps = ForwardSteps[None]

Strategy = Callable[["Generation"], StrategySteps]
"""What decides the tokens of a generation."""

Value = Callable[[list[int]], float]
"""Rates a text, given as ids, prompt included: for `mcts`, larger is better, best within [0, 1]."""

_CHUNK = 64
"""Tokens of a prompt whose logits exist at once when all of them are wanted."""


@dataclass(frozen=True)
class Request:
    """What was submitted to the engine; every generation of a request shares it.

    Attributes:
        id: which its outputs carry.
        prompt: ids, at least one.
        generation_config: the settings.
        ending: when a continuation ends.
        strategy: what decides the tokens.
        value: rates a text, for `mcts`; None for the model's own likelihood.
        adapter: which of the model's adapters computes it; 0 for none.
    """

    id: int
    prompt: list[int]
    generation_config: GenerationConfig
    ending: Ending
    strategy: Strategy
    value: Value | None = None
    adapter: int = 0


@dataclass(frozen=True)
class Resources:
    """What a generation uses of the engine.

    Attributes:
        slots: slots of the model's cache.
        draft_slots: slots of the draft model's cache; None where none proposes tokens.
        tokenizer: None for bare ids.
        n_vocab: V; the ids that a strategy feeds are below it.
    """

    slots: SlotManager
    draft_slots: SlotManager | None
    tokenizer: Tokenizer | None
    n_vocab: int


class Generation:
    """One continuation in the making (or one beam search, which makes several).

    Attributes:
        request_id: of the request it belongs to.
        index: which of the request's continuations.
        prompt: ids, at least one.
        generation_config: the settings.
        ending: when it ends.
        value: rates a text, for `mcts`; None for the model's own likelihood.
        sampler: what its next token's logits go through.
        slots: slots of the model's cache.
        draft_slots: slots of the draft model's cache, if there is one.
        tokenizer: None for bare ids.
        forward_requests: what it waits for.
        closed: whether it has ended.
    """

    def __init__(self, request: Request, resources: Resources, *, sampler: Sampler, index: int = 0) -> None:
        self.request_id = request.id
        self.index = index
        self.prompt = request.prompt
        self.generation_config = request.generation_config
        self.ending = request.ending
        self.value = request.value
        self.sampler = sampler
        self.slots = resources.slots
        self.draft_slots = resources.draft_slots
        self.tokenizer = resources.tokenizer
        self._n_vocab = resources.n_vocab
        self._adapter = request.adapter
        self.forward_requests: list[ForwardRequest] = []
        self.closed = False
        self._strategy = request.strategy
        self._continuations = [Continuation(self.ending, self.tokenizer)]
        self._scores: list[float | None] = [None]
        self._prompt_tokens: list[Token] | None = None
        self._own: list[CachedSequence] = []
        self._error: str | None = None
        self._steps: StrategySteps | None = None

    # --- operations of a strategy ---------------------------------------------------------------------------------

    def open(self, ids: Sequence[int] = (), reuse: bool = True, manager: SlotManager | None = None) -> CachedSequence:
        """A new sequence of `ids`, in the model's slots or in those of `manager`."""
        manager = manager or self.slots
        sequence = manager.open(ids, reuse, self._adapter if manager is self.slots else 0)  # a draft has none
        self._own.append(sequence)
        return sequence

    def fork(self, sequence: CachedSequence) -> CachedSequence:
        """A new sequence equal to `sequence`."""
        twin = sequence.manager.fork(sequence)
        self._own.append(twin)
        return twin

    def truncate(self, sequence: CachedSequence, length: int) -> None:
        """Cut `sequence` to its first `length` tokens."""
        sequence.manager.truncate(sequence, length)

    def free(self, sequence: CachedSequence) -> None:
        """Give the slot of `sequence` back."""
        self._own.remove(sequence)
        sequence.manager.free(sequence)

    def read_prompt(
        self, sampler: Sampler | None = None, hidden: bool = False
    ) -> ForwardSteps[tuple[ForwardRequest, Tensor | None]]:
        """Prefill: a sequence that has read the prompt.

        Returns:
            the prompt's last request, with its logits (1, V); and the hidden states of all of it, (T, C), if `hidden`.
        """
        scored = self.generation_config.prompt_logprobs is not None and self.index == 0
        if not scored and not hidden:
            (request,) = yield [ForwardRequest(self.open(self.prompt), sampler=sampler)]
            return request, None
        sequence = self.open(reuse=False)
        ids = self.prompt[-self.slots.capacity :] if not scored else self.prompt
        states, before = [], None
        for chunk in self._chunks(ids):
            last = len(sequence.ids) + len(chunk) == len(ids)
            (request,) = yield [
                ForwardRequest(sequence, chunk, num_logits=len(chunk), hidden=hidden, sampler=sampler if last else None)
            ]
            if scored:
                self._score_prompt(chunk, before, request.logits)
            before = request.logits[-1:]
            states.append(request.states)
        request.logits = request.logits[-1:]
        return request, torch.cat(states) if hidden else None

    def _chunks(self, ids: list[int]) -> list[list[int]]:
        """Chunks that fit into the window; past its end every token has a window of its own."""
        within, beyond = ids[: self.slots.capacity], ids[self.slots.capacity :]
        return [within[i : i + _CHUNK] for i in range(0, len(within), _CHUNK)] + [[token] for token in beyond]

    def _score_prompt(self, chunk: list[int], before: Tensor | None, logits: Tensor) -> None:
        """Log-probabilities of `chunk`, from the (1, V) logits before it and its own (n, V)."""
        n = self.generation_config.prompt_logprobs or 0
        if self._prompt_tokens is None or before is None:
            self._prompt_tokens = [Token(chunk[0])]
            chunk, rows = chunk[1:], logits[:-1]
        else:
            rows = torch.cat([before, logits[:-1]])
        for token, row in zip(chunk, rows):
            logprob, top = ranked(row, token, n)
            self._prompt_tokens.append(Token(token, logprob, top=top))

    # --- results of a strategy ------------------------------------------------------------------------------------

    @property
    def left(self) -> int:
        """Tokens that may still be written."""
        return self.ending.limit - len(self._continuations[0].ids)

    def ends(self, path: Sequence[int]) -> bool:
        """Whether the continuation would end with, or before, the last token of `path`."""
        return self._continuations[0].would_end(path)

    def emit(self, token: Token) -> bool:
        """The next token is decided; whether the continuation ends with it."""
        self.sampler.observe(token.id)
        return self._continuations[0].push(token)

    def deliver(self, hypotheses: list[tuple[list[Token], float]]) -> None:
        """The results of a search, the best first, with their scores."""
        self._continuations = [Continuation(self.ending, self.tokenizer) for _ in hypotheses]
        self._scores = [score for _, score in hypotheses]
        for continuation, (tokens, _) in zip(self._continuations, hypotheses):
            for token in tokens:
                continuation.push(token)
            if continuation.finish_reason is None:
                continuation.finish("length")

    # --- for the engine -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start; `forward_requests` is then what to compute first, or the generation has ended."""
        self._steps = self._all_steps()
        self._advance(lambda steps: next(steps))

    def resume(self) -> None:
        """Go on after all `forward_requests` are done."""
        self._advance(lambda steps: steps.send(self.forward_requests))

    def _advance(self, go_on: Callable[[StrategySteps], list[ForwardRequest]]) -> None:
        """The strategy's next step; whatever it raises ends this generation, and no other."""
        assert self._steps is not None
        try:
            self._enqueue(go_on(self._steps))
        except StopIteration:
            if any(continuation.finish_reason is None for continuation in self._continuations):
                self.fail(
                    RuntimeError("the strategy has ended and its continuation has not")
                )  # nobody would hear of it
            self._close()
        except Exception as error:
            self.fail(error)

    def _all_steps(self) -> StrategySteps:
        if self.ending.limit > 0:
            yield from self._strategy(self)
            return
        if self.generation_config.prompt_logprobs is not None and self.index == 0:
            yield from self.read_prompt()
        self._continuations[0].finish("length")

    def _enqueue(self, requests: list[ForwardRequest]) -> None:
        """Wait for `requests`, whose tokens join their sequences now.

        Raises:
            ValueError: for requests that would fail in the forward pass, and with them those of other generations.
        """
        if len({id(request.sequence) for request in requests}) < len(requests):
            raise ValueError("the strategy asks twice for one sequence")
        for request in requests:
            if request.sequence not in self._own or id_outside(request.tokens, self._n_vocab) is not None:
                raise ValueError("the strategy asks for a sequence that is not its own, or for an id that there is not")
            request.sequence.manager.append(request.sequence, request.tokens)
            pending = request.sequence.manager.pending(request.sequence)
            if not request.sequence.ids or not 1 <= request.num_logits <= max(1, pending):
                raise ValueError("the strategy asks for logits of no token, or of more than are computed")
        self.forward_requests = requests

    def stop(self, reason: FinishReason, error: str | None = None) -> None:
        """End it from outside: it was cancelled, or it failed."""
        self._error = error
        for continuation in self._continuations:
            continuation.finish(reason)
        self._close(forget=error is not None)

    def fail(self, error: Exception) -> None:
        """End it because of an exception of its own, which goes to the log.

        The output has the exception's type, or the text of a `UserError`, which is written for the user; any other
        message might quote a text.
        """
        log.error("request %d, continuation %d failed", self.request_id, self.index, exc_info=error)
        reason = f"{type(error).__name__} at {self.position}: the log says where it was raised"
        with suppress(Exception):  # a second exception of the same generation: the first one is reported
            self.stop("error", str(error) if isinstance(error, UserError) else reason)
        if not self.closed:
            self._close(forget=True)

    def _close(self, forget: bool = False) -> None:
        if self._steps is not None:
            with suppress(Exception):  # a strategy that does not let itself be closed still gives its slots back
                self._steps.close()
        for sequence in self._own:
            sequence.manager.free(sequence, forget)
        self._own, self.forward_requests, self.closed = [], [], True

    def outputs(self) -> list[Output]:
        """What is new since the last call."""
        outputs = []
        for i, continuation in enumerate(self._continuations):
            tokens, text = continuation.drain()
            if not tokens and not text and not self.closed:
                continue
            output = Output(self.request_id, self.index + i, tokens, text, continuation.finish_reason, self._scores[i])
            if i == 0:
                output.prompt, self._prompt_tokens = self._prompt_tokens, None
                output.error = self._error
            outputs.append(output)
        return outputs

    def contained_outputs(self) -> list[Output]:
        """`outputs`, or the end with an error if they cannot be made."""
        try:
            return self.outputs()
        except Exception as error:
            self.fail(error)
            return [Output(self.request_id, self.index, finish_reason="error", error=self._error)]

    @property
    def position(self) -> str:
        """Which token of which continuation is next, for messages."""
        return f"token {len(self._continuations[0].ids) + 1} of continuation {self.index}"
