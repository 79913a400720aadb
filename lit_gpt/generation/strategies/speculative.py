"""Speculative decoding (Leviathan et al. 2023, arXiv 2211.17192): a draft proposes, the model verifies in one pass.

The output has exactly the distribution that sampling from the model has, and greedy output is the model's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import ForwardSteps, Generation, StrategySteps
from lit_gpt.generation.slots import CachedSequence

_LONGEST_NGRAM = 3


def speculative(generation: Generation) -> StrategySteps:
    """Propose up to `num_draft_tokens`, verify, keep what the model agrees with and one token of its own."""
    request, _ = yield from generation.read_prompt()
    sequence, logits = (
        request.sequence,
        request.logits,
    )  # logits: (1, V) after the whole text, (0, V) when its last token is not fed
    text = list(generation.prompt)
    drafter = _ModelDraft(generation) if generation.draft_slots is not None else None
    while True:
        n = generation.generation_config.num_draft_tokens
        n = max(0, min(n, generation.slots.capacity - len(text), generation.left - 1))
        proposal, q = look_up(text, n), None
        if drafter is not None:
            proposal, q = yield from drafter.propose(text, n)
        new = text[len(sequence.ids) :] + proposal
        if new:
            (request,) = yield [ForwardRequest(sequence, new, num_logits=len(new))]
            logits = torch.cat([logits, request.logits])
        accepted, token = verify(generation, proposal, q, logits)
        for i, chosen in enumerate([*accepted, token]):
            if generation.emit(generation.sampler.report(logits[i], chosen)):
                return
        text += [*accepted, token]
        generation.truncate(sequence, len(text) - 1)
        logits = logits[:0]


def verify(generation: Generation, proposal: list[int], q: Tensor | None, logits: Tensor) -> tuple[list[int], int]:
    """How much of `proposal` to accept, and the token after that.

    Args:
        generation: whose sampler and random numbers to use.
        proposal: n proposed tokens.
        q: (n, V) probabilities they were drawn from; None where they were not drawn but looked up, a q of 1 each.
        logits: (n + 1, V) of the model, the first after the text so far.
    """
    shaped = generation.sampler.process(logits, proposal)
    if generation.generation_config.greedy:
        own = L.argmax(shaped).tolist()
        n = next((i for i, token in enumerate(proposal) if token != own[i]), len(proposal))
        return proposal[:n], own[n]
    p = shaped.softmax(-1)
    for i, token in enumerate(proposal):
        share = 1.0 if q is None else q[i, token].item()
        if generation.sampler.uniform("accept", i) * share < p[i, token].item():
            continue
        rest = p[i].clone()
        if q is None:
            rest[token] = 0
        else:
            rest = (rest - q[i]).clamp(min=0)
        return proposal[:i], _draw(
            generation, rest if bool(rest.any()) else p[i], i
        )  # equal up to rounding: nothing is left
    return proposal, _draw(generation, p[-1], len(proposal))


def _draw(generation: Generation, weights: Tensor, ahead: int) -> int:
    return int(L.choose(weights.log()[None], L.column([generation.sampler.uniform("token", ahead)], weights)))


class _ModelDraft:
    """The draft model's own sequence of the text."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        self._sequence: CachedSequence | None = None

    def propose(self, text: list[int], n: int) -> ForwardSteps[tuple[list[int], Tensor | None]]:
        """`n` tokens after `text`, drawn one by one, and the (n, V) probabilities they were drawn from."""
        generation, proposal, rows = self._generation, list[int](), list[Tensor]()
        if n == 0:
            return proposal, None
        (request,) = yield [self._catch_up(text)]
        for i in range(n):
            walker = generation.sampler.after(proposal)
            shaped = walker.process(request.logits[-1:])
            if generation.generation_config.greedy:
                token = int(L.argmax(shaped))
            else:
                rows.append(shaped.softmax(-1))
                token = int(L.choose(shaped, L.column([walker.uniform("draft")], shaped)))
            proposal.append(token)
            if i + 1 < n:
                (request,) = yield [ForwardRequest(request.sequence, [token])]
        return proposal, torch.cat(rows) if rows else None

    def _catch_up(self, text: list[int]) -> ForwardRequest:
        """Make its sequence equal to `text`: rejected proposals are cut off, and what the model decided is appended."""
        generation, sequence = self._generation, self._sequence
        if sequence is None:
            self._sequence = generation.open(text, manager=generation.draft_slots)
            return ForwardRequest(self._sequence)
        generation.truncate(sequence, min(len(sequence.ids), len(text) - 1))  # all before the last was its proposal
        new = text[len(sequence.ids) :]
        return ForwardRequest(sequence, new, num_logits=len(new))


def look_up(text: list[int], n: int) -> list[int]:
    """Up to `n` tokens that followed the latest earlier occurrence of the last few tokens: prompt look-up.

    >>> look_up([1, 2, 3, 4, 1, 2], 3)
    [3, 4, 1]
    """
    for size in range(min(_LONGEST_NGRAM, len(text) - 1), 0, -1):
        tail = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start] == tail[0] and text[start : start + size] == tail:
                return text[start + size : start + size + n] if n > 0 else []
    return []
