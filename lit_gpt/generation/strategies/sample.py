"""`sample` and `greedy`: one row, one token at a time."""

from __future__ import annotations

from lit_gpt.generation.generation import Run, Steps
from lit_gpt.generation.rows import Feed


def sample(run: Run) -> Steps:
    """Draw each token from the processed distribution, or take its arg-max."""
    feed, _ = yield from run.read_prompt(pick=run.processors)
    while True:
        token = run.processors.report(feed.logits[-1], feed.choice)
        if run.emit(token):
            return
        (feed,) = yield [Feed(feed.row, [token.id], pick=run.processors)]
