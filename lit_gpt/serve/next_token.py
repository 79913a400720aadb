"""`POST /v1/next_token`: the distribution after a text, what the knobs make of it, and where one draw lands.

Nothing is recomputed by rules of its own: the numbers come out of the engine's forward pass and of the functions by
which it draws, so a completion with the same seed takes the token that is shown here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.generation import Generation, Strategy, StrategySteps
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.sampling import Sampler, candidates
from lit_gpt.serve.api_errors import ApiError, bad_request
from lit_gpt.serve.protocol import NextTokenRequest, effective_temperature
from lit_gpt.serve.service import Service


@dataclass(frozen=True)
class Look:
    """One position, seen whole.

    Attributes:
        raw: (V,) the model's own probabilities.
        shaped: (V,) after penalties, temperature and filters.
        start: (V,) where each token's interval begins on the line that the draw lands on.
        cut_by: filter → (V,) True for what it took away, in the filters' order.
        u: the draw in [0, 1), or None where the likeliest is taken.
        token: what it fell on.
        position: how many tokens were generated before.
    """

    raw: Tensor
    shaped: Tensor
    start: Tensor
    cut_by: dict[str, Tensor]
    u: float | None
    token: int
    position: int


def look(sampler: Sampler, logits: Tensor) -> Look:
    """Draw as the engine would from (1, V) logits, and keep everything that led there."""
    raw = logits[0].double().softmax(-1)
    adjusted = sampler.apply_penalties(logits)
    position = sampler.position
    if sampler.generation_config.greedy:
        token = int(adjusted.argmax())
        certain = torch.zeros_like(raw).index_fill(0, torch.tensor(token, device=raw.device), 1.0)
        return Look(raw, certain, torch.zeros_like(raw), {"temperature": certain == 0}, None, token, position)
    shaped, ids = candidates([sampler], adjusted)
    u = sampler.uniform()
    place = L.choose(shaped, torch.tensor([[u]], dtype=torch.float64, device=logits.device))
    mass = shaped[0].double().softmax(-1)
    start = mass.cumsum(-1) - mass
    if ids is not None:
        place = ids[0][place]
        mass = torch.zeros_like(raw).scatter_(0, ids[0], mass)
        start = torch.zeros_like(raw).scatter_(0, ids[0], start)
    return Look(raw, mass, start, _cuts(sampler.generation_config, adjusted), u, int(place), position)


def _cuts(generation_config: GenerationConfig, adjusted: Tensor) -> dict[str, Tensor]:
    """Filter → (V,) what it removed of what those before it had left."""
    left = L.temperature(adjusted, generation_config.temperature)
    stages = {"top_k": left if generation_config.top_k is None else L.top_k(left, generation_config.top_k)}
    stages["top_p"] = (
        L.top_p(stages["top_k"], generation_config.top_p) if generation_config.top_p < 1 else stages["top_k"]
    )
    stages["min_p"] = (
        L.min_p(stages["top_p"], generation_config.min_p) if generation_config.min_p > 0 else stages["top_p"]
    )
    cuts = {}
    for name, rest in stages.items():
        cuts[name] = (rest.isneginf() & ~left.isneginf())[0]
        left = rest
    return cuts


def looking(seen: list[Look], generated: Sequence[int]) -> Strategy:
    """A strategy of one token that puts what it sees into `seen`."""

    def strategy(run: Generation) -> StrategySteps:
        for token in generated:
            run.sampler.observe(token)
        feed, _ = yield from run.read_prompt()
        if run.sampler.apply_penalties(feed.logits).amax().isfinite():
            seen.append(look(run.sampler, feed.logits))
        run.emit(Token(seen[0].token if seen else 0))

    return strategy


async def next_token(service: Service, request: NextTokenRequest) -> dict[str, Any]:
    """The answer to a request.

    Raises:
        ApiError: 400 for a text that does not fit, 500 if the model fails.
    """
    arrived = time.perf_counter()
    (prompt,) = await service.encode([request.prompt])
    if request.generated:
        await service.encode([request.generated], "generated")
    text = prompt + request.generated
    service.check_context_length([text], 0, "prompt")
    seen: list[Look] = []
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
    strategy = looking(seen, request.generated)
    async with aclosing(service.worker.run([text], generation_config, arrived, strategy)) as news:
        async for _, output in news:
            if output.finish_reason == "error":
                raise ApiError(500, output.error or "the model failed", code="generation_failed")
    if not seen:
        raise bad_request("these penalties make the logits overflow: choose smaller ones", "repetition_penalty")
    return _answer(service, request, prompt, seen[0])


def _answer(service: Service, request: NextTokenRequest, prompt: list[int], seen: Look) -> dict[str, Any]:
    listed = seen.raw.topk(min(request.limit, len(seen.raw))).indices.tolist()
    if seen.token not in listed:
        listed.append(seen.token)
    candidates = [_candidate(service, seen, token) for token in listed]
    drawn = candidates[listed.index(seen.token)]
    return {
        "model": service.name,
        "tokens": [{"id": token, "text": service.token_text(token)} for token in prompt],
        "candidates": candidates,
        "kept": int((seen.shaped > 0).sum()),
        "vocabulary": len(seen.raw),
        "rest_raw": max(0.0, 1 - sum(each["raw"] for each in candidates)),
        "rest_probability": max(0.0, 1 - sum(each["probability"] for each in candidates)),
        "entropy": _entropy(seen.raw),
        "processed_entropy": _entropy(seen.shaped),
        "draw": {"seed": request.seed, "position": seen.position, "u": seen.u, "token": drawn},
        "eot_id": service.tokenizer.eot_id,
        "context_left": service.config.block_size - len(prompt) - len(request.generated),
    }


def _candidate(service: Service, seen: Look, token: int) -> dict[str, Any]:
    start, share = seen.start[token].item(), seen.shaped[token].item()
    return {
        "id": token,
        "text": service.token_text(token),
        "raw": seen.raw[token].item(),
        "probability": share,
        "cut_by": next((name for name, out in seen.cut_by.items() if out[token]), None),
        "start": start,
        "end": start + share,
    }


def _entropy(p: Tensor) -> float:
    """In bits."""
    return abs(torch.special.entr(p).sum().item()) / math.log(2)
