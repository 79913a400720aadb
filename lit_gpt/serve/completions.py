"""`POST /v1/completions`: from the engine's news to OpenAI's choices, streamed or whole."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Output, Token
from lit_gpt.serve.api_errors import ApiError
from lit_gpt.serve.protocol import CompletionRequest, Sampling
from lit_gpt.serve.service import Service
from lit_gpt.tokenizer.tokenizer import TextStream


class Entry(NamedTuple):
    """A token and the character at which its text begins."""

    token: Token
    offset: int


@dataclass
class Piece:
    """What is new of one choice, or all of it.

    Attributes:
        entries: tokens whose text is in `text`, end-of-text among them.
        echoed: how many of the entries belong to the prompt.
    """

    index: int
    text: str
    entries: list[Entry]
    echoed: int
    finish_reason: str | None
    first: bool


class Shape(NamedTuple):
    """How an endpoint writes its answers: the `object` of whole bodies and of chunks, and a choice of each."""

    kind: str
    chunk_kind: str
    choice: Callable[[Piece], dict[str, Any]]
    delta: Callable[[Piece], dict[str, Any]]


@dataclass
class Plan:
    """A request that was checked: what the engine is to do, and how its answer is written.

    Attributes:
        prompts: ids of each prompt.
        echoes: what stands before each continuation: the prompt's text if `echo`, else "".
        arrived: `time.perf_counter()` at the request's start.
    """

    request: Sampling
    prompts: list[list[int]]
    echoes: list[str]
    generation_config: GenerationConfig
    arrived: float
    shape: Shape
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a usage chunk."""
        options = self.request.stream_options
        return bool(options and options.include_usage)

    @property
    def echo_scores(self) -> bool:
        """Whether the prompt's log-probabilities are wanted."""
        return self.generation_config.prompt_logprobs is not None

    def head(self, service: Service, kind: str) -> dict[str, Any]:
        """What every body begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": service.name}


async def plan_completion(service: Service, request: CompletionRequest, prompts: list[str | list[int]]) -> Plan:
    """Check a request against the model and tokenise it.

    Raises:
        ApiError: 400.
    """
    arrived = time.perf_counter()
    request.refuse_unsupported()
    service.check_ids(request)
    ids = await service.encode(prompts)
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    service.check_room(ids, max_tokens)
    scored = request.logprobs if request.echo else None
    generation_config = request.generation_config(max_tokens, request.logprobs, scored)
    texts = [prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt) for prompt in prompts]
    echoes = texts if request.echo else [""] * len(ids)

    def choice(piece: Piece) -> dict[str, Any]:
        body: dict[str, Any] = {"index": piece.index, "text": piece.text, "logprobs": None}
        if request.logprobs is not None:
            body["logprobs"] = columns(service, piece.entries)
        if request.return_token_ids:
            body["token_ids"] = [entry.token.id for entry in piece.entries[piece.echoed :]]
        return {**body, "finish_reason": piece.finish_reason}

    return Plan(
        request, ids, echoes, generation_config, arrived, Shape("text_completion", "text_completion", choice, choice)
    )


class Tail:
    """One choice as it grows: holds a token's entry back until its text is out, so that no stop string leaks by it."""

    def __init__(self, service: Service, generation_config: GenerationConfig, offset: int) -> None:
        eot = service.tokenizer.eot_id
        self.end_ids = {*generation_config.stop_token_ids, *([] if eot is None else [eot])}
        self.stops = bool(generation_config.stops)
        self.shown = offset
        self._measure = TextStream(service.tokenizer)
        self._at = offset
        self._held: list[Entry] = []

    def take(self, output: Output) -> tuple[str, list[Entry]]:
        """The text of `output` and the entries that it completes."""
        for token in output.tokens:
            self._held.append(Entry(token, self._at))
            if token.id not in self.end_ids:
                self._at += len(self._measure.feed([token.id]))
        self.shown += len(output.text)
        # what a stop string swallowed stays unsaid; an end-of-text token is an entry without text
        ended_by_token = bool(self._held) and self._held[-1].token.id in self.end_ids
        swallowed = self.stops and output.finish_reason == "stop" and not ended_by_token
        rest = output.finish_reason is not None and not swallowed
        ready = [entry for entry in self._held if rest or entry.offset < self.shown]
        self._held = self._held[len(ready) :]
        return output.text, ready


def columns(service: Service, entries: list[Entry]) -> dict[str, Any]:
    """OpenAI's four columns. The first token of a prompt has no log-probability: nothing came before it."""
    columns: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token, offset in entries:
        columns["tokens"].append(service.token_text(token.id))
        columns["token_logprobs"].append(finite(token.logprob))
        columns["top_logprobs"].append(None if token.logprob is None else top_by_text(service, token))
        columns["text_offset"].append(offset)
    return columns


def top_by_text(service: Service, token: Token) -> dict[str, float]:
    """Text → log-probability of the likeliest tokens and the chosen one; of two with the same text, the larger."""
    best: dict[str, float] = {}
    for number, logprob in (*token.top, (token.id, token.logprob)):
        text, value = service.token_text(number), finite(logprob)
        if value is not None:
            best[text] = max(value, best.get(text, value))
    return best


def finite(logprob: float | None) -> float | None:
    """JSON has no −∞; OpenAI writes −9999."""
    return None if logprob is None else max(logprob, -9999.0)


def prompt_entries(service: Service, tokens: list[Token]) -> list[Entry]:
    """Entries of an echoed prompt."""
    entries, offset, measure = [], 0, TextStream(service.tokenizer)
    for token in tokens:
        entries.append(Entry(token, offset))
        offset += len(measure.feed([token.id]))
    return entries


class Choices:
    """The choices of one request: turns the engine's news into pieces, in whatever order they come."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self.service, self.plan = service, plan
        self.completion_tokens = 0
        self._tails: dict[int, Tail] = {}
        self._scored: dict[int, list[Entry]] = {}  # by prompt: its entries, for every sample's echo
        self._early: dict[int, list[Output]] = {}  # by prompt: news of samples that came before its entries

    def pieces(self, prompt: int, output: Output) -> list[Piece]:
        """What `output` adds to its choice, and to those that have waited for it.

        Raises:
            ApiError: 500 for a continuation that failed inside the engine.
        """
        if output.finish_reason == "error":
            raise ApiError(500, output.error or "the model failed", code="generation_failed")
        self.completion_tokens += len(output.tokens)
        if output.prompt is not None:
            self._scored[prompt] = prompt_entries(self.service, output.prompt)
        if self.plan.echo_scores and prompt not in self._scored:  # only the first sample brings them
            self._early.setdefault(prompt, []).append(output)
            return []
        return [self._piece(prompt, news) for news in (*self._early.pop(prompt, []), output)]

    def _piece(self, prompt: int, output: Output) -> Piece:
        index = prompt * self.plan.generation_config.num_samples + output.index
        echo, echoed, first = "", [], index not in self._tails
        if first:
            echo, echoed = self.plan.echoes[prompt], self._scored.get(prompt, [])
            self._tails[index] = Tail(self.service, self.plan.generation_config, len(echo))
        text, entries = self._tails[index].take(output)
        return Piece(index, echo + text, echoed + entries, len(echoed), output.finish_reason, first)

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(len(ids) for ids in self.plan.prompts)
        written = self.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def whole(service: Service, plan: Plan, facts: dict[str, Any]) -> dict[str, Any]:
    """The answer as one body. The token counts go into `facts` too, for the log."""
    choices = Choices(service, plan)
    done: dict[int, Piece] = {}
    async with aclosing(service.worker.run(plan.prompts, plan.generation_config, plan.arrived)) as news:
        async for prompt, output in news:
            for piece in choices.pieces(prompt, output):
                so_far = done.setdefault(piece.index, piece)
                if so_far is not piece:
                    so_far.text += piece.text
                    so_far.entries += piece.entries
                    so_far.finish_reason = piece.finish_reason
    facts.update(choices.usage())
    body = plan.head(service, plan.shape.kind)
    return {**body, "choices": [plan.shape.choice(done[i]) for i in sorted(done)], "usage": choices.usage()}


async def streamed(service: Service, plan: Plan, facts: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
    """The answer as chunks; with `include_usage` a last one without choices."""
    choices, head = Choices(service, plan), plan.head(service, plan.shape.chunk_kind)
    if plan.include_usage:
        head["usage"] = None
    try:
        async with aclosing(service.worker.run(plan.prompts, plan.generation_config, plan.arrived)) as news:
            async for prompt, output in news:
                for piece in choices.pieces(prompt, output):
                    if not (piece.text or piece.entries or piece.finish_reason):
                        continue  # a token that only begins a character
                    yield {**head, "choices": [plan.shape.delta(piece)]}
    finally:
        facts.update(choices.usage())
    if plan.include_usage:
        yield {**head, "choices": [], "usage": choices.usage()}
