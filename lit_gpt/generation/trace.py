"""How each token was chosen: what the model said, what processing made of it, and the draw.

A `Tracer` is an observer of the decoding engine: every strategy reports each token that it decides on, with the logits
it was decided from. Nothing is computed for it when no observer is set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.complete import Completion
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.sampling import Sampler, candidates
from lit_gpt.tokenizer.printable import show_token
from lit_gpt.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Candidate:
    """A token that might have been chosen.

    Attributes:
        id: its id.
        piece: how it reads; half a character as its bytes.
        before: probability by the model.
        after: probability after processing; 0 where it was cut.
        cut_by: what cut it: `forbidden`, `top_k`, `top_p` or `min_p`; None if it was kept.
    """

    id: int
    piece: str
    before: float
    after: float
    cut_by: str | None = None


@dataclass(frozen=True)
class Cut:
    """What one filter removed: how many tokens, and the probability that the model had given them together."""

    by: str
    tokens: int
    mass: float


@dataclass(frozen=True)
class Step:
    """One decision.

    Attributes:
        position: how many tokens were generated before it.
        chosen: the token.
        how: `drawn`, `largest`, or the strategy's name.
        rank: the chosen token's place by the model's probability, from 1.
        draw: the random number in [0, 1) that decided; None where nothing was drawn, or by more than one number.
        interval: where the chosen token stands on the line from 0 to 1 that the draw points at.
        entropy_before: of the model's distribution, in bits.
        entropy_after: of the processed distribution, in bits.
        kept: tokens with a probability after processing.
        cuts: what each filter removed, in order.
        candidates: the likeliest tokens before and after processing, and the chosen one, likeliest first.
    """

    position: int
    chosen: Candidate
    how: str
    rank: int
    draw: float | None
    interval: tuple[float, float] | None
    entropy_before: float
    entropy_after: float
    kept: int
    cuts: list[Cut]
    candidates: list[Candidate]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Trace:
    """All decisions of one continuation.

    Attributes:
        place: of the prompt in the input, from 0.
        sample: which of the prompt's continuations.
        prompt: as text.
        text: the continuation.
        steps: one for each token.
    """

    place: int
    sample: int
    prompt: str
    text: str
    steps: list[Step]


class Tracer:
    """Takes notes of every decision of an engine whose `observer` it is."""

    def __init__(self, tokenizer: Tokenizer | None, top: int = 10) -> None:
        """A tracer that keeps the `top` likeliest candidates of each step."""
        self._tokenizer = tokenizer
        self._top = top
        # By identity: a beam search decides on many tokens that end up in no text, and equal ones are not the same.
        self._steps: dict[int, tuple[Token, Step]] = {}

    def __call__(self, sampler: Sampler, raw: Tensor, token: Token) -> None:
        """Take note that `token` was chosen where the model said `raw`, (V,)."""
        self._steps[id(token)] = (token, self._step(sampler, raw, token.id))

    def take(self, completions: Sequence[Completion]) -> list[list[Step]]:
        """The steps of a prompt's finished continuations, which are then forgotten. Beams share their first tokens."""
        tokens = {id(token) for completion in completions for token in completion.tokens}
        found = [[self._steps[id(token)][1] for token in completion.tokens] for completion in completions]
        for token in tokens:
            del self._steps[token]
        return found

    def forget(self) -> None:
        """Drop what no continuation has claimed."""
        self._steps.clear()

    def _step(self, sampler: Sampler, raw: Tensor, token: int) -> Step:
        generation_config = sampler.generation_config
        stages = _stages(sampler, raw)
        before, after = raw.double().softmax(-1), stages[-1][1].double().softmax(-1)
        cuts = _cuts(stages)
        drawn = generation_config.strategy == "sample" and not generation_config.greedy
        chosen = self._candidate(token, before, after, cuts)
        ids = {token, *_top(before, self._top), *_top(after, self._top)}
        candidates = [self._candidate(one, before, after, cuts) for one in ids]
        return Step(
            position=sampler.position,
            chosen=chosen,
            how="drawn" if drawn else "largest" if generation_config.greedy else generation_config.strategy,
            rank=int((before > before[token]).sum()) + 1,
            draw=sampler.uniform() if drawn else None,
            interval=_interval(sampler, stages[1][1], token) if drawn else None,
            entropy_before=_bits(before),
            entropy_after=_bits(after),
            kept=int((after > 0).sum()),
            cuts=[Cut(name, int(gone.sum()), before[gone].sum().item()) for name, gone in cuts],
            candidates=sorted(candidates, key=lambda one: (-one.after, -one.before, one.id)),
        )

    def _candidate(self, token: int, before: Tensor, after: Tensor, cuts: list[tuple[str, Tensor]]) -> Candidate:
        piece = f"#{token}" if self._tokenizer is None else show_token(self._tokenizer, token)
        cut_by = next((name for name, gone in cuts if bool(gone[token])), None)
        return Candidate(token, piece, before[token].item(), after[token].item(), cut_by)


def _stages(sampler: Sampler, raw: Tensor) -> list[tuple[str, Tensor]]:
    """The (V,) logits as the model gave them, and after each processor that can cut, by name; the last is `shape`'s."""
    generation_config = sampler.generation_config
    adjusted = sampler.apply_penalties(raw[None])
    stages = [("", raw[None]), ("forbidden", adjusted)]
    if not generation_config.greedy:
        logits = L.temperature(adjusted, generation_config.temperature)
        if generation_config.top_k is not None and generation_config.strategy not in ("contrastive", "mcts"):
            stages.append(("top_k", logits := L.top_k(logits, generation_config.top_k)))
        if generation_config.top_p < 1:
            stages.append(("top_p", logits := L.top_p(logits, generation_config.top_p)))
        if generation_config.min_p > 0:
            stages.append(("min_p", logits := L.min_p(logits, generation_config.min_p)))
        stages.append(("", logits))
    return [(name, logits[0]) for name, logits in stages]


def _cuts(stages: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """What each filter removed, (V,), by the filter's name; those that removed nothing are left out."""
    steps = ((name, (before > -math.inf) & (after == -math.inf)) for (_, before), (name, after) in pairwise(stages))
    return [(name, gone) for name, gone in steps if bool(gone.any())]


def _interval(sampler: Sampler, adjusted: Tensor, token: int) -> tuple[float, float]:
    """Where `token` stands on the line that the draw points at, in the order in which the engine lays it out."""
    logits, ids = candidates([sampler], adjusted[None])
    weights = logits[0].double().softmax(-1)
    place = token if ids is None else int((ids[0] == token).nonzero()[0, 0])
    end = weights[: place + 1].sum().item()
    return end - weights[place].item(), end


def _top(probabilities: Tensor, n: int) -> list[int]:
    values, ids = probabilities.topk(min(n, len(probabilities)))
    return ids[values > 0].tolist()


def _bits(probabilities: Tensor) -> float:
    """Entropy in bits; what has no probability adds nothing."""
    return torch.special.entr(probabilities).sum().item() / math.log(2)


def traces(tracer: Tracer, place: int, prompt: str, completions: Sequence[Completion]) -> list[Trace]:
    """The traces of a prompt's continuations."""
    return [
        Trace(place, sample, prompt, completion.text, steps)
        for sample, (completion, steps) in enumerate(zip(completions, tracer.take(completions)))
    ]
