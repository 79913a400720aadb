"""Replay of a continuation that exists already, so that an observer sees how each of its tokens was chosen.

A trace of every token costs several times what the token does, so nobody records one that may not be asked for. It can
be had afterwards: the tokens are known, so the model reads them like a prompt, and each is reported with the logits
that it was chosen from and the state that its sampler had.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lit_gpt.generation.complete import Completion, stream_outputs
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation, Strategy, StrategySteps
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.trace import Step, Tracer

_CHUNK = 64
"""Tokens whose logits exist at once."""


def replay(tokens: Sequence[int]) -> Strategy:
    """A strategy that writes `tokens`, whatever the model would choose."""

    def steps(generation: Generation) -> StrategySteps:
        request, _ = yield from generation.read_prompt()
        if _write(generation, tokens[:1], request.logits[-1:]):
            return
        for start in range(0, len(tokens) - 1, _CHUNK):
            fed = tokens[start : start + _CHUNK]
            written = tokens[start + 1 : start + 1 + len(fed)]
            (request,) = yield [ForwardRequest(request.sequence, fed, num_logits=len(fed))]
            if _write(generation, written, request.logits):
                return

    return steps


def _write(generation: Generation, tokens: Sequence[int], logits: Tensor) -> bool:
    """Report and write `tokens`, of which each was chosen from its row of (n, V) logits; whether the last one ends."""
    return any(generation.emit(generation.sampler.report(row, token)) for token, row in zip(tokens, logits))


def _settings(generation_config: GenerationConfig, n_tokens: int) -> GenerationConfig:
    """The settings of a continuation, which now ends with its last token, why ever it did."""
    least = min(generation_config.min_new_tokens, n_tokens)
    return replace(generation_config, max_new_tokens=n_tokens, min_new_tokens=least, stop=[])


def replay_steps(
    engine: Engine, prompt_ids: Sequence[int], tokens: Sequence[int], generation_config: GenerationConfig
) -> list[Step]:
    """How each of `tokens` was chosen.

    Args:
        engine: without other requests.
        prompt_ids: what they continue.
        tokens: the whole continuation, an end token included; all of it within the model's context.
        generation_config: its settings, with the seed that it was drawn with; its strategy `sample` or `greedy`.

    Raises:
        UserError, RuntimeError: as `stream_outputs`.
    """
    if not tokens:
        return []
    tracer, completion, before = Tracer(engine.tokenizer), Completion(), engine.observer
    engine.observer = tracer
    try:
        for output in stream_outputs(engine, prompt_ids, _settings(generation_config, len(tokens)), replay(tokens)):
            completion.add(output)
    finally:
        engine.observer = before
    (steps,) = tracer.drain([completion])
    return steps
