"""Beam search: the hypotheses with the largest sum of log-probabilities over length^length_penalty."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation, StrategySteps
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.sampling import Sampler
from lit_gpt.generation.slots import CachedSequence
from lit_gpt.generation.stopping import scan


@dataclass
class Hypothesis:
    """A text so far.

    Attributes:
        tokens: what was generated.
        total: sum of the processed log-probabilities.
        sampler: in the state after these tokens.
        held: bytes that may become a stop string.
        request: its sequence, and the logits after its last token once that is computed; None for a finished one.
    """

    tokens: list[Token]
    total: float
    sampler: Sampler
    held: bytes = b""
    request: ForwardRequest | None = None


def beam(generation: Generation) -> StrategySteps:
    """Keep the `num_beams` best texts; a finished one leaves the beam and is kept as long as it is among the best.

    The search ends when no running hypothesis can pass the worst of `num_beams` finished ones any more, whatever
    follows (`early_stopping="never"` of transformers), or at the last token allowed.
    """
    generation_config = generation.generation_config
    request, _ = yield from generation.read_prompt()
    running = [Hypothesis([], 0.0, generation.sampler, request=request)]  # one: equal beams would find the same texts
    finished: list[Hypothesis] = []
    for length in range(1, generation.ending.limit + 1):
        running, ended = _expand(generation, running, generation_config.num_beams, length)
        finished = heapq.nlargest(
            generation_config.num_beams, [*finished, *ended], key=lambda one: _score(generation, one)
        )
        if not running or not _can_win(generation, running, finished):
            break
        yield _extend(generation, running)
    finished.sort(key=lambda one: -_score(generation, one))
    best = finished[: generation_config.num_samples]
    generation.deliver([(one.tokens, _score(generation, one)) for one in best])


def _score(generation: Generation, hypothesis: Hypothesis) -> float:
    return hypothesis.total / len(hypothesis.tokens) ** generation.generation_config.length_penalty


def _can_win(generation: Generation, running: list[Hypothesis], finished: list[Hypothesis]) -> bool:
    """Whether the best running hypothesis might yet pass the worst finished one.

    Its sum can only fall; with a positive penalty it looks best at the greatest length, else at its present one.
    """
    if len(finished) < generation.generation_config.num_beams:
        return True
    best = max(running, key=lambda one: one.total)
    power = generation.generation_config.length_penalty
    length = generation.ending.limit if power > 0 else len(best.tokens)
    return best.total / length**power > _score(generation, finished[-1])


def _expand(
    generation: Generation, running: list[Hypothesis], width: int, length: int
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """The `width` best running continuations by one token, and those among the `width` best of all that end.

    What ends farther down the list is dropped: had it been worth keeping, it would have been above.
    """
    rows = [one.sampler.process(one.request.logits[-1:])[0].log_softmax(-1) for one in running if one.request]
    before = torch.tensor([[one.total] for one in running], dtype=rows[0].dtype, device=rows[0].device)
    totals = torch.stack(rows) + before  # (beams, V)
    V = totals.size(-1)
    width_of_search = min(
        (1 + max(1, len(generation.ending.end_ids) + len(generation.ending.stops))) * width, totals.numel()
    )
    values, indices = totals.flatten().topk(width_of_search)
    kept: list[tuple[int, Token, float, bytes]] = []
    ended: list[Hypothesis] = []
    for rank, (total, index) in enumerate(zip(values.tolist(), indices.tolist())):
        if total == -math.inf or len(kept) == width:
            break
        parent, token = running[index // V], index % V
        reported = _report(parent, token)
        held, stopped = _held(generation, parent, token)
        if generation.ending.reason(token, length, stopped) is None:
            kept.append((index // V, reported, total, held))
        elif rank < width:
            ended.append(Hypothesis([*parent.tokens, reported], total, parent.sampler))
    return _branch(generation, running, kept), ended


def _report(parent: Hypothesis, token: int) -> Token:
    assert parent.request is not None
    return parent.sampler.report(parent.request.logits[-1], token)


def _held(generation: Generation, parent: Hypothesis, token: int) -> tuple[bytes, bool]:
    if generation.tokenizer is None or not generation.ending.stops:
        return b"", False
    _, held, stopped = scan(parent.held, generation.tokenizer.token_bytes(token), generation.ending.stops)
    return held, stopped


def _branch(
    generation: Generation, running: list[Hypothesis], kept: list[tuple[int, Token, float, bytes]]
) -> list[Hypothesis]:
    """Turn chosen tokens into hypotheses: a parent's first child takes over its sequence, the others get copies.

    Sequences of childless parents are freed first, so that there is never need for more than `num_beams`.
    """
    parents = {parent for parent, *_ in kept}
    for i, one in enumerate(running):
        if i not in parents and one.request is not None:
            generation.free(one.request.sequence)
    sequences: dict[int, CachedSequence] = {}
    children = []
    for parent, token, total, held in kept:
        one = running[parent]
        assert one.request is not None
        if parent in sequences:
            sequence = generation.fork(sequences[parent])
        else:
            sequence = sequences[parent] = one.request.sequence
        sampler = one.sampler.fork()
        sampler.observe(token.id)
        children.append(Hypothesis([*one.tokens, token], total, sampler, held, ForwardRequest(sequence)))
    return children


def _extend(generation: Generation, running: list[Hypothesis]) -> list[ForwardRequest]:
    """Requests for each hypothesis' last token."""
    for one in running:
        assert one.request is not None
        one.request = ForwardRequest(one.request.sequence, [one.tokens[-1].id])
    return [one.request for one in running if one.request is not None]
