"""`POST /v1/completions`: from the engine's outputs to OpenAI's choices, streamed or in one body."""

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
from lit_gpt.serve.worker import JobOutput
from lit_gpt.tokenizer.tokenizer import TextStream

_MANY_TOKENS = 256
"""Tokens of a choice from which on it is made on a thread."""


class TokenEntry(NamedTuple):
    """A token and the character at which its text begins."""

    token: Token
    offset: int


@dataclass
class ChoiceDelta:
    """What a chunk adds to one choice, or in a response that is not streamed the whole choice.

    Attributes:
        index: of the choice, prompt × n + sample.
        entries: tokens whose text is in `text`, end-of-text among them.
        echoed: how many of the entries belong to the prompt.
        first: whether it is the first of its choice.
    """

    index: int
    text: str
    entries: list[TokenEntry]
    echoed: int
    finish_reason: str | None
    first: bool


class ResponseFormat(NamedTuple):
    """How an endpoint writes its responses: `object` and choices, of a single body and of a stream's chunks."""

    object_name: str
    chunk_object_name: str
    choice: Callable[[ChoiceDelta], dict[str, Any]]
    chunk_choice: Callable[[ChoiceDelta], dict[str, Any]]


@dataclass
class Plan:
    """A request that was checked: what the engine is to do, and how the response is written.

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
    response_format: ResponseFormat
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

    def head(self, service: Service, object_name: str) -> dict[str, Any]:
        """The fields that every body begins with."""
        return {"id": self.id, "object": object_name, "created": self.created, "model": service.name}

    def run(self, service: Service) -> AsyncGenerator[JobOutput, None]:
        """The engine's outputs; raises what `Worker.run` raises."""
        return service.worker.run(self.prompts, self.generation_config, self.arrived, adapter=service.adapter)


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
    service.check_context_length(ids, max_tokens)
    scored = request.logprobs if request.echo else None
    generation_config = request.generation_config(max_tokens, request.logprobs, scored)
    texts = [prompt if isinstance(prompt, str) else service.tokenizer.decode(prompt) for prompt in prompts]
    echoes = texts if request.echo else [""] * len(ids)

    def choice(delta: ChoiceDelta) -> dict[str, Any]:
        body: dict[str, Any] = {"index": delta.index, "text": delta.text, "logprobs": None}
        if request.logprobs is not None:
            body["logprobs"] = logprob_columns(service, delta.entries)
        if request.return_token_ids:
            body["token_ids"] = [entry.token.id for entry in delta.entries[delta.echoed :]]
        return {**body, "finish_reason": delta.finish_reason}

    return Plan(
        request,
        ids,
        echoes,
        generation_config,
        arrived,
        ResponseFormat("text_completion", "text_completion", choice, choice),
    )


class ChoiceState:
    """A choice under way. A token's entry is held until its text is sent, so that no stop string leaks through it."""

    def __init__(self, service: Service, generation_config: GenerationConfig, offset: int) -> None:
        eot = service.tokenizer.eot_id
        self.end_ids = {*generation_config.stop_token_ids, *([] if eot is None else [eot])}
        self.stops = bool(generation_config.stops)
        self.sent = offset
        self._measure = TextStream(service.tokenizer)
        self._at = offset
        self._held: list[TokenEntry] = []

    def add(self, output: Output) -> tuple[str, list[TokenEntry]]:
        """The text of `output`, and the entries whose text is sent with it."""
        for token in output.tokens:
            self._held.append(TokenEntry(token, self._at))
            if token.id not in self.end_ids:
                self._at += len(self._measure.feed([token.id]))
        self.sent += len(output.text)
        # entries of a stop string are dropped; an end-of-text token is an entry without text
        ended_by_token = bool(self._held) and self._held[-1].token.id in self.end_ids
        in_stop_string = self.stops and output.finish_reason == "stop" and not ended_by_token
        send_all = output.finish_reason is not None and not in_stop_string
        ready = [entry for entry in self._held if send_all or entry.offset < self.sent]
        self._held = self._held[len(ready) :]
        return output.text, ready


def logprob_columns(service: Service, entries: list[TokenEntry]) -> dict[str, Any]:
    """OpenAI's four lists. The first token of a prompt has no log-probability: nothing came before it."""
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


def prompt_entries(service: Service, tokens: list[Token]) -> list[TokenEntry]:
    """Entries of an echoed prompt."""
    entries, offset, measure = [], 0, TextStream(service.tokenizer)
    for token in tokens:
        entries.append(TokenEntry(token, offset))
        offset += len(measure.feed([token.id]))
    return entries


class ChoiceAssembler:
    """The choices of one request: turns the engine's outputs into deltas, in whatever order they come."""

    def __init__(self, service: Service, plan: Plan) -> None:
        self.service, self.plan = service, plan
        self.completion_tokens = 0
        self._states: dict[int, ChoiceState] = {}
        self._scored: dict[int, list[TokenEntry]] = {}  # by prompt: its entries, for every sample's echo
        self._early: dict[int, list[Output]] = {}  # by prompt: outputs of samples that came before its entries

    def deltas(self, prompt: int, output: Output) -> list[ChoiceDelta]:
        """What `output` adds to its choice, and the held deltas of other samples that waited for the prompt's entries.

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
        return [self._delta(prompt, each) for each in (*self._early.pop(prompt, []), output)]

    def _delta(self, prompt: int, output: Output) -> ChoiceDelta:
        index = prompt * self.plan.generation_config.num_samples + output.index
        echo, echoed, first = "", [], index not in self._states
        if first:
            echo, echoed = self.plan.echoes[prompt], self._scored.get(prompt, [])
            self._states[index] = ChoiceState(self.service, self.plan.generation_config, len(echo))
        text, entries = self._states[index].add(output)
        return ChoiceDelta(index, echo + text, echoed + entries, len(echoed), output.finish_reason, first)

    def usage(self) -> dict[str, int]:
        """Tokens read and written."""
        read = sum(len(ids) for ids in self.plan.prompts)
        written = self.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


async def full_body(service: Service, plan: Plan, log_fields: dict[str, Any]) -> dict[str, Any]:
    """The response as one body. The token counts go into `log_fields` too."""
    choices = ChoiceAssembler(service, plan)
    done: dict[int, ChoiceDelta] = {}
    async with aclosing(plan.run(service)) as outputs:
        async for prompt, output in outputs:
            for delta in choices.deltas(prompt, output):
                so_far = done.setdefault(delta.index, delta)
                if so_far is not delta:
                    so_far.text += delta.text
                    so_far.entries += delta.entries
                    so_far.finish_reason = delta.finish_reason
    log_fields.update(choices.usage())
    body = plan.head(service, plan.response_format.object_name)
    written = [await _written(service, plan.response_format, done[i]) for i in sorted(done)]
    return {**body, "choices": written, "usage": choices.usage()}


async def _written(service: Service, response_format: ResponseFormat, delta: ChoiceDelta) -> dict[str, Any]:
    """A whole choice; one of many tokens is made on a thread: with log-probabilities it has 20 entries for each."""
    if len(delta.entries) < _MANY_TOKENS:
        return response_format.choice(delta)
    return await service.in_thread(response_format.choice, delta)


async def stream_chunks(
    service: Service, plan: Plan, log_fields: dict[str, Any]
) -> AsyncGenerator[dict[str, Any], None]:
    """The response as chunks; with `include_usage` a last one without choices."""
    choices, head = ChoiceAssembler(service, plan), plan.head(service, plan.response_format.chunk_object_name)
    if plan.include_usage:
        head["usage"] = None
    try:
        async with aclosing(plan.run(service)) as outputs:
            async for prompt, output in outputs:
                for delta in choices.deltas(prompt, output):
                    if not (delta.text or delta.entries or delta.finish_reason):
                        continue  # a token that only begins a character
                    yield {**head, "choices": [plan.response_format.chunk_choice(delta)]}
    finally:
        log_fields.update(choices.usage())
    if plan.include_usage:
        yield {**head, "choices": [], "usage": choices.usage()}
