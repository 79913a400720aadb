"""Beam search: the hypotheses with the largest sum of log-probabilities over length^length_penalty."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch

from lit_gpt.generation.generation import Run, Steps
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.rows import Feed, Row
from lit_gpt.generation.sampling import Processors
from lit_gpt.generation.stopping import scan


@dataclass
class Hypothesis:
    """A text so far.

    Attributes:
        tokens: what was generated.
        total: sum of the processed log-probabilities.
        processors: with what it has said.
        held: bytes that may become a stop string.
        feed: its row, and the logits after its last token once that was fed; None for a finished one.
    """

    tokens: list[Token]
    total: float
    processors: Processors
    held: bytes = b""
    feed: Feed | None = None


def beam(run: Run) -> Steps:
    """Keep the `num_beams` best texts; a finished one leaves the beam and is kept as long as it is among the best.

    The search ends when no running hypothesis can pass the worst of `num_beams` finished ones any more, whatever
    follows (`early_stopping="never"` of transformers), or at the last token allowed.
    """
    generation = run.generation
    feed, _ = yield from run.read_prompt()
    running = [Hypothesis([], 0.0, run.processors, feed=feed)]  # one: equal beams would find the same texts
    finished: list[Hypothesis] = []
    for length in range(1, run.ending.limit + 1):
        running, ended = _expand(run, running, generation.num_beams, length)
        finished = heapq.nlargest(generation.num_beams, [*finished, *ended], key=lambda one: _score(run, one))
        if not running or not _can_win(run, running, finished):
            break
        yield _extend(run, running)
    finished.sort(key=lambda one: -_score(run, one))
    best = finished[: generation.num_samples]
    run.deliver([(one.tokens, _score(run, one)) for one in best])


def _score(run: Run, hypothesis: Hypothesis) -> float:
    return hypothesis.total / len(hypothesis.tokens) ** run.generation.length_penalty


def _can_win(run: Run, running: list[Hypothesis], finished: list[Hypothesis]) -> bool:
    """Whether the best running hypothesis might yet pass the worst finished one.

    Its sum can only fall; with a positive penalty it looks best at the greatest length, else at its present one.
    """
    if len(finished) < run.generation.num_beams:
        return True
    best = max(running, key=lambda one: one.total)
    power = run.generation.length_penalty
    length = run.ending.limit if power > 0 else len(best.tokens)
    return best.total / length**power > _score(run, finished[-1])


def _expand(run: Run, running: list[Hypothesis], width: int, length: int) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The `width` best running continuations by one token, and those among the `width` best of all that end.

    What ends farther down the list is dropped: had it been worth keeping, it would have been above.
    """
    rows = [one.processors.shape(one.feed.logits[-1:])[0].log_softmax(-1) for one in running if one.feed]
    before = torch.tensor([[one.total] for one in running], dtype=rows[0].dtype, device=rows[0].device)
    totals = torch.stack(rows) + before  # (beams, V)
    V = totals.size(-1)
    width_of_search = min((1 + max(1, len(run.ending.end_ids) + len(run.ending.stops))) * width, totals.numel())
    values, places = totals.flatten().topk(width_of_search)
    kept: list[tuple[int, Token, float, bytes]] = []
    ended: list[Hypothesis] = []
    for rank, (total, place) in enumerate(zip(values.tolist(), places.tolist())):
        if total == -math.inf or len(kept) == width:
            break
        parent, token = running[place // V], place % V
        reported = _report(parent, token)
        held, stopped = _held(run, parent, token)
        if run.ending.reason(token, length, stopped) is None:
            kept.append((place // V, reported, total, held))
        elif rank < width:
            ended.append(Hypothesis([*parent.tokens, reported], total, parent.processors))
    return _branch(run, running, kept), ended


def _report(parent: Hypothesis, token: int) -> Token:
    assert parent.feed is not None
    return parent.processors.report(parent.feed.logits[-1], token)


def _held(run: Run, parent: Hypothesis, token: int) -> tuple[bytes, bool]:
    if run.tokenizer is None or not run.ending.stops:
        return b"", False
    _, held, stopped = scan(parent.held, run.tokenizer.token_bytes(token), run.ending.stops)
    return held, stopped


def _branch(run: Run, running: list[Hypothesis], kept: list[tuple[int, Token, float, bytes]]) -> list[Hypothesis]:
    """Turn chosen tokens into hypotheses: a parent's first child takes over its row, the others get copies.

    Rows of childless parents are freed first, so that there is never need for more than `num_beams`.
    """
    parents = {parent for parent, *_ in kept}
    for i, one in enumerate(running):
        if i not in parents and one.feed is not None:
            run.free(one.feed.row)
    rows: dict[int, Row] = {}
    children = []
    for parent, token, total, held in kept:
        one = running[parent]
        assert one.feed is not None
        row = run.fork(rows[parent]) if parent in rows else rows.setdefault(parent, one.feed.row)
        processors = one.processors.fork()
        processors.observe(token.id)
        children.append(Hypothesis([*one.tokens, token], total, processors, held, Feed(row)))
    return children


def _extend(run: Run, running: list[Hypothesis]) -> list[Feed]:
    """Feeds of each hypothesis' last token."""
    for one in running:
        assert one.feed is not None
        one.feed = Feed(one.feed.row, [one.tokens[-1].id])
    return [one.feed for one in running if one.feed is not None]
