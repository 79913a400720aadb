"""`sample` and `greedy`: one sequence, one token at a time."""

from __future__ import annotations

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation, StrategySteps


def sample(generation: Generation) -> StrategySteps:
    """Draw each token from the processed distribution, or take its arg-max."""
    request, _ = yield from generation.read_prompt(sampler=generation.sampler)
    while True:
        token = generation.sampler.report(request.logits[-1], request.choice)
        if generation.emit(token):
            return
        (request,) = yield [ForwardRequest(request.sequence, [token.id], sampler=generation.sampler)]
