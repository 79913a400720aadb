"""The trace: for each token the model's distribution, what each stage of sampling cut, and the draw.

`Step` is the record of one decision, for `predict --trace` and for the server's next-token page. A `Tracer` is an
observer of the decoding engine: every strategy reports each token that it decides on, with the logits it was decided
from. Nothing is computed for it when no observer is set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.generation.complete import Completion
from lit_gpt.generation.outputs import Token
from lit_gpt.generation.sampling import Sampler, StageResult, candidates
from lit_gpt.tokenizer.printable import named_bytes, show_token
from lit_gpt.tokenizer.tokenizer import Tokenizer

Listing = Callable[[Tensor, Tensor, int], list[int]]
"""Which candidates a `Step` lists, in order: from the (V,) probabilities before and after, and the chosen token."""


@dataclass(frozen=True)
class Candidate:
    """A token that might have been chosen.

    Attributes:
        id: its id.
        piece: its printable text; half a character as its bytes.
        before: probability by the model.
        after: probability after processing; 0 where it was cut.
        cut_by: the stage of `lit_gpt.generation.sampling.STAGES` that cut it; None if it was kept.
        interval: its part of the line from 0 to 1 that the draw points at; None where nothing was drawn. That of a
            token that was cut is empty.
    """

    id: int
    piece: str
    before: float
    after: float
    cut_by: str | None = None
    interval: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain values, without the interval: the trace writes the chosen token's only."""
        return {
            "id": self.id,
            "piece": self.piece,
            "before": self.before,
            "after": self.after,
            "cut_by": self.cut_by,
        }


@dataclass(frozen=True)
class Cut:
    """What one stage removed.

    Attributes:
        by: the stage's name.
        tokens: how many it removed.
        mass: the probability that the model had given them together.
    """

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
        rank: the chosen token's rank by the model's probability, from 1.
        draw: the random number in [0, 1) that decided; None where nothing was drawn, or by more than one number.
        entropy_before: of the model's distribution, in bits.
        entropy_after: of the processed distribution, in bits.
        kept: tokens with a probability after processing.
        cuts: what each stage removed, in order.
        candidates: other tokens that might have been chosen, and the chosen one.
    """

    position: int
    chosen: Candidate
    how: str
    rank: int
    draw: float | None
    entropy_before: float
    entropy_after: float
    kept: int
    cuts: list[Cut]
    candidates: list[Candidate]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The chosen token's part of the line from 0 to 1 that the draw points at."""
        return self.chosen.interval

    def to_dict(self) -> dict[str, object]:
        """Plain values, as a line of JSON has them."""
        return {
            "position": self.position,
            "chosen": self.chosen.to_dict(),
            "how": self.how,
            "rank": self.rank,
            "draw": self.draw,
            "interval": self.interval,
            "entropy_before": self.entropy_before,
            "entropy_after": self.entropy_after,
            "kept": self.kept,
            "cuts": [vars(cut) for cut in self.cuts],
            "candidates": [candidate.to_dict() for candidate in self.candidates],
        }


@dataclass(frozen=True)
class Trace:
    """All decisions of one continuation.

    Attributes:
        prompt_index: of the prompt in the input, from 0.
        sample: which of the prompt's continuations.
        prompt: as text, in UTF-8; one of ids can end inside a character.
        prompt_ids: what the model read at first, what stands before every text included.
        text: the continuation.
        steps: one for each token.
    """

    prompt_index: int
    sample: int
    prompt: bytes
    prompt_ids: list[int]
    text: str
    steps: list[Step]

    @property
    def prompt_shape(self) -> tuple[int, int]:
        """Of the initial prompt's tensor, (1, T); each decision adds 1 to T."""
        return (1, len(self.prompt_ids))

    def sequences(self, tokenizer: Tokenizer | None) -> Iterator[bytes]:
        """The text that each decision continues, in UTF-8: the prompt, then what was chosen before.

        It can end inside a character, after half of its bytes. Special tokens stand there by their names; without a
        tokenizer it is the list of ids.
        """
        ids, text = list(self.prompt_ids), self.prompt
        for step in self.steps:
            yield str(ids).encode() if tokenizer is None else text
            ids.append(step.chosen.id)
            text += b"" if tokenizer is None else named_bytes(tokenizer, step.chosen.id)


def record_step(sampler: Sampler, raw: Tensor, token: int, listing: Listing, show: Callable[[int], str]) -> Step:
    """The record of a decision.

    Args:
        sampler: in its state before the decision.
        raw: the model's logits, (V,).
        token: what was chosen.
        listing: chooses the candidates to list.
        show: the printable text of an id.
    """
    generation_config = sampler.generation_config
    stages = list(sampler.stages(raw[None]))
    before, after = raw.double().softmax(-1), stages[-1].after[0].double().softmax(-1)
    cuts = _cuts(stages)
    drawn = generation_config.spec.one_draw and not generation_config.greedy
    starts = _interval_starts(sampler, raw) if drawn else None

    def candidate(one: int) -> Candidate:
        low, share = None if starts is None else starts[one].item(), after[one].item()
        cut_by = next((name for name, gone in cuts if bool(gone[one])), None)
        interval = None if low is None else (low, low + share)
        return Candidate(one, show(one), before[one].item(), share, cut_by, interval)

    return Step(
        position=sampler.position,
        chosen=candidate(token),
        how="drawn" if drawn else "largest" if sampler.takes_largest else generation_config.strategy,
        rank=int((before > before[token]).sum()) + 1,
        draw=sampler.uniform() if drawn else None,
        entropy_before=_bits(before),
        entropy_after=_bits(after),
        kept=int((after > 0).sum()),
        cuts=[Cut(name, int(gone.sum()), before[gone].sum().item()) for name, gone in cuts],
        candidates=[candidate(one) for one in listing(before, after, token)],
    )


def likeliest(n: int) -> Listing:
    """The `n` likeliest tokens before and after processing, and the chosen one: the likeliest after it first."""

    def listing(before: Tensor, after: Tensor, token: int) -> list[int]:
        ids = {token, *_top(before, n), *_top(after, n)}
        return sorted(ids, key=lambda one: (-after[one].item(), -before[one].item(), one))

    return listing


def likeliest_before(n: int) -> Listing:
    """The `n` likeliest tokens by the model, likeliest first, and the chosen one at the end if it is none of them."""

    def listing(before: Tensor, after: Tensor, token: int) -> list[int]:
        ids: list[int] = before.topk(min(n, len(before))).indices.tolist()
        return ids if token in ids else [*ids, token]

    return listing


class Tracer:
    """Records every decision of an engine whose `observer` it is."""

    def __init__(self, tokenizer: Tokenizer | None, top: int = 10) -> None:
        """A tracer that keeps the `top` likeliest candidates of each step."""
        self._tokenizer = tokenizer
        self._listing = likeliest(top)
        # By identity: a beam search decides on many tokens that end up in no text, and equal ones are not the same.
        self._steps: dict[int, tuple[Token, Step]] = {}

    def __call__(self, sampler: Sampler, raw: Tensor, token: Token) -> None:
        """Record that `token` was chosen from the model's logits `raw`, (V,)."""
        self._steps[id(token)] = (token, record_step(sampler, raw, token.id, self._listing, self._show))

    def drain(self, completions: Sequence[Completion]) -> list[list[Step]]:
        """The steps of a prompt's finished continuations, which are then forgotten. Beams share their first tokens."""
        tokens = {id(token) for completion in completions for token in completion.tokens}
        found = [[self._steps[id(token)][1] for token in completion.tokens] for completion in completions]
        for token in tokens:
            del self._steps[token]
        return found

    def _show(self, token: int) -> str:
        return f"#{token}" if self._tokenizer is None else show_token(self._tokenizer, token)


def traces(
    tracer: Tracer, prompt_index: int, prompt: bytes, prompt_ids: Sequence[int], completions: Sequence[Completion]
) -> list[Trace]:
    """The traces of a prompt's continuations. The arguments are `Trace`'s, but for the finished `completions`."""
    return [
        Trace(prompt_index, sample, prompt, list(prompt_ids), completion.text, steps)
        for sample, (completion, steps) in enumerate(zip(completions, tracer.drain(completions)))
    ]


def _cuts(stages: Sequence[StageResult]) -> list[tuple[str, Tensor]]:
    """What each stage removed, as a (V,) mask, by the stage's name; those that removed nothing are left out."""
    changed = [stage for stage in stages if stage.after is not stage.before]
    masks = ((name, ((before > -math.inf) & (after == -math.inf))[0]) for name, before, after in changed)
    return [(name, gone) for name, gone in masks if bool(gone.any())]


def _interval_starts(sampler: Sampler, raw: Tensor) -> Tensor:
    """Where each token's part of the line begins that the draw points at, (V,), in the order in which the engine draws.

    Args:
        sampler: one that draws.
        raw: the model's logits, (V,).
    """
    logits, ids = candidates([sampler], sampler.apply_penalties(raw[None]))
    mass = logits[0].double().softmax(-1)
    starts = mass.cumsum(-1) - mass
    return starts if ids is None else torch.zeros_like(raw, dtype=starts.dtype).scatter_(-1, ids[0], starts)


def _top(probabilities: Tensor, n: int) -> list[int]:
    values, ids = probabilities.topk(min(n, len(probabilities)))
    return ids[values > 0].tolist()


def _bits(probabilities: Tensor) -> float:
    """Entropy in bits; what has no probability adds nothing, and certainty has 0, not -0."""
    return abs(torch.special.entr(probabilities).sum().item()) / math.log(2)
