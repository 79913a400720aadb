"""`POST /v1/next_token`: the distribution after a text, what each stage of sampling cuts, and where one draw lands.

Nothing is recomputed by rules of its own: the token is chosen by the function by which the engine chooses, so a
completion with the same seed takes the token that is shown here, and the record is the one of `predict --trace`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from lit_gpt.generation.generation import Generation, Strategy, StrategySteps
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.sampling import NONE, choose_tokens
from lit_gpt.generation.trace import Candidate, Step, likeliest_before, record_step
from lit_gpt.serve.api_errors import ApiError, bad_request
from lit_gpt.serve.protocol import NextTokenRequest, effective_temperature
from lit_gpt.serve.service import Service


def record_next_token(steps: list[Step], generated: Sequence[int], limit: int, show: Callable[[int], str]) -> Strategy:
    """A strategy of one token that puts the record of its choice into `steps`; none if penalties leave no choice.

    Args:
        steps: an empty list.
        generated: ids that count as generated before.
        limit: how many candidates the record lists, besides the chosen one.
        show: the printable text of an id.
    """

    def strategy(run: Generation) -> StrategySteps:
        for token in generated:
            run.sampler.observe(token)
        feed, _ = yield from run.read_prompt()
        (token,) = choose_tokens([run.sampler], feed.logits)
        if token != NONE:
            steps.append(record_step(run.sampler, feed.logits[0], token, likeliest_before(limit), show))
        run.emit(Token(max(token, 0)))

    return strategy


async def next_token(service: Service, request: NextTokenRequest) -> dict[str, Any]:
    """The answer to a request, as `lit_gpt.serve.protocol.NextTokenResponse` describes it.

    Raises:
        ApiError: 400 for a text that does not fit, 500 if the model fails.
    """
    arrived = time.perf_counter()
    (prompt,) = await service.encode([request.prompt])
    if request.generated:
        await service.encode([request.generated], "generated")
    text = prompt + request.generated
    service.check_context_length([text], 0, "prompt")
    steps: list[Step] = []
    generation_config = GenerationConfig(
        max_new_tokens=1,
        temperature=effective_temperature(request.temperature),
        top_k=request.top_k if request.top_k and request.top_k > 0 else None,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        seed=request.seed,
    )
    strategy = record_next_token(steps, request.generated, request.limit, service.token_text)
    async with aclosing(service.worker.run([text], generation_config, arrived, strategy, service.adapter)) as outputs:
        async for _, output in outputs:
            if output.finish_reason == "error":
                raise ApiError(500, output.error or "the model failed", code="generation_failed")
    if not steps:
        raise bad_request("these penalties make the logits overflow: choose smaller ones", "repetition_penalty")
    return _answer(service, request, prompt, steps[0])


def _answer(service: Service, request: NextTokenRequest, prompt: list[int], step: Step) -> dict[str, Any]:
    candidates = [_candidate(one) for one in step.candidates]
    return {
        "model": service.name,
        "tokens": [{"id": token, "text": service.token_text(token)} for token in prompt],
        "candidates": candidates,
        "kept": step.kept,
        "vocabulary": service.n_vocab,
        "rest_raw": max(0.0, 1 - sum(each["raw"] for each in candidates)),
        "rest_probability": max(0.0, 1 - sum(each["probability"] for each in candidates)),
        "entropy": step.entropy_before,
        "processed_entropy": step.entropy_after,
        "draw": {"seed": request.seed, "position": step.position, "u": step.draw, "token": _candidate(step.chosen)},
        "eot_id": service.tokenizer.eot_id,
        "context_left": service.config.block_size - len(prompt) - len(request.generated),
    }


def _candidate(one: Candidate) -> dict[str, Any]:
    start, end = one.interval or (0.0, one.after)
    return {
        "id": one.id,
        "text": one.piece,
        "raw": one.before,
        "probability": one.after,
        "cut_by": one.cut_by,
        "start": start,
        "end": end,
    }
