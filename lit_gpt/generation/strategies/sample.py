"""`sample` and `greedy`: one row, one token at a time."""

from __future__ import annotations

from lit_gpt.generation.generation import Generation, StrategySteps
from lit_gpt.generation.rows import ForwardRequest


def sample(generation: Generation) -> StrategySteps:
    """Draw each token from the processed distribution, or take its arg-max."""
    feed, _ = yield from generation.read_prompt(sampler=generation.sampler)
    while True:
        token = generation.sampler.report(feed.logits[-1], feed.choice)
        if generation.emit(token):
            return
        (feed,) = yield [ForwardRequest(feed.row, [token.id], sampler=generation.sampler)]
