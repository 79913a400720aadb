"""Sampling: the named stages from the model's logits to the next token, and the batched draw.

`STAGES` is the one list of what happens to logits, in order. `Sampler.process`, the trace and the server's next-token
page read it. `choose_tokens` does the same for many continuations at once and without spreading the candidates over
the whole vocabulary again; a property test holds it to the list.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Token

NONE = -1
"""Instead of a token: there is none to choose."""

Observer = Callable[["Sampler", Tensor, Token], None]
"""Records a decision: the sampler in its state before it, the model's logits (V,), and the token."""


class Sampler:
    """Applies a `GenerationConfig` to the logits of one continuation, in the order of `lit_gpt.generation.logits`.

    Its state is what was generated so far: penalties and the mask of end-of-text depend on it.

    Attributes:
        generation_config: the settings.
        seed: of this continuation's draws.
        position: how many tokens it has generated.
        observer: called with (this sampler, the model's logits (V,), token) for each token that is decided on; or None.
    """

    def __init__(
        self,
        generation_config: GenerationConfig,
        prompt: Sequence[int],
        n_vocab: int,
        end_ids: frozenset[int] = frozenset(),
        eot_ids: frozenset[int] = frozenset(),
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        """A sampler of a continuation that has not begun.

        Args:
            generation_config: the settings.
            prompt: its ids.
            n_vocab: V.
            end_ids: what ends the continuation; masked until `min_new_tokens` are out.
            eot_ids: those of them that `ignore_eos` masks throughout.
            seed: of the draws.
            device: of the logits.
        """
        self.generation_config = generation_config
        self.seed = seed
        self.position = 0
        self.observer: Observer | None = None
        self._end_ids = [token for token in end_ids if token < n_vocab]
        self._counts: Tensor | None = None  # (V,) times generated
        self._seen: Tensor | None = None  # (V,) in the prompt or generated
        if generation_config.frequency_penalty or generation_config.presence_penalty:
            self._counts = torch.zeros(n_vocab, device=device)
        if generation_config.repetition_penalty != 1:
            self._seen = torch.zeros(n_vocab, dtype=torch.bool, device=device)
            self._seen[torch.as_tensor(list(prompt), device=device, dtype=torch.long)] = True
        self._bias = _bias(generation_config, [token for token in eot_ids if token < n_vocab], device)

    def fork(self) -> Sampler:
        """An independent copy."""
        sampler = copy.copy(self)
        sampler._counts = None if self._counts is None else self._counts.clone()
        sampler._seen = None if self._seen is None else self._seen.clone()
        return sampler

    def after(self, path: Sequence[int]) -> Sampler:
        """A copy for which the tokens of `path` were generated too."""
        sampler = self.fork()
        for token in path:
            sampler.observe(token)
        return sampler

    def observe(self, token: int) -> None:
        """`token` was generated."""
        self.position += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    @cached_property
    def _depends_on_text(self) -> bool:
        """Whether the penalties depend on the prompt or on the tokens generated so far."""
        return self._counts is not None or self._seen is not None

    @property
    def has_penalties(self) -> bool:
        """Whether `apply_penalties` may change the next token's logits."""
        return self._bias is not None or self._depends_on_text or self.position < self.generation_config.min_new_tokens

    @property
    def takes_largest(self) -> bool:
        """Whether the next token is the arg-max of the processed logits.

        A search is not among them: with a temperature of 0 the roll-outs of `mcts` are greedy, the choice is its own.
        """
        spec = self.generation_config.spec
        return self.generation_config.greedy and (spec.greedy or "seed" in spec.knobs)

    def stages(self, logits: Tensor) -> Iterator[StageResult]:
        """What each of `STAGES` makes of the next token's logits, (1, V), in order.

        A stage without effect with these settings gives back the very tensor that it got.
        """
        for stage in STAGES:
            before, logits = logits, stage.apply(self, logits)
            yield StageResult(stage.name, before, logits)

    def apply_penalties(self, logits: Tensor, path: Sequence[int] = ()) -> Tensor:
        """Penalties and bias on (n, V) logits, of which row i comes after the first i tokens of `path`."""
        if not self.has_penalties:
            return logits
        if len(logits) == 1:
            return _apply(PENALTIES, self, logits)
        sampler, rows = self.fork(), []
        for i in range(len(logits)):
            rows.append(_apply(PENALTIES, sampler, logits[i : i + 1]))
            if i < len(path):
                sampler.observe(path[i])
        return torch.cat(rows)

    def process(self, logits: Tensor, path: Sequence[int] = ()) -> Tensor:
        """All stages but the choice: the (n, V) logits that the next token is drawn from.

        With a temperature of 0 that is the penalties and the bias only, of which the arg-max is taken.

        Args:
            logits: rows as `apply_penalties` takes them.
            path: as there.
        """
        return _apply(FILTERS, self, self.apply_penalties(logits, path))

    def uniform(self, purpose: str = "token", ahead: int = 0) -> float:
        """The random number of the position `ahead` tokens from now."""
        return L.uniform(self.seed, self.position + ahead, purpose)

    def report(self, raw: Tensor, token: int) -> Token:
        """`token`, chosen from the model's logits `raw` (V,), with the log-probabilities that were asked for."""
        n, reported = self.generation_config.logprobs, Token(token)
        if n is not None:
            logprob, top = ranked(raw, token, n)
            processed_logprob, processed_top = ranked(self.process(raw[None])[0], token, n)
            reported = Token(token, logprob, processed_logprob, top, processed_top)
        if self.observer is not None:
            self.observer(self, raw, reported)
        return reported


# --- the stages -------------------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """A named step from the model's logits to the choice: (sampler, (n, V) logits) → (n, V) logits."""

    name: str
    apply: Callable[[Sampler, Tensor], Tensor]


class StageResult(NamedTuple):
    """What a stage got and what it made of it, (1, V) each."""

    name: str
    before: Tensor
    after: Tensor


def _repetition_penalty(sampler: Sampler, logits: Tensor) -> Tensor:
    if sampler._seen is None:
        return logits
    return L.repetition_penalty(logits, sampler._seen, sampler.generation_config.repetition_penalty)


def _count_penalties(sampler: Sampler, logits: Tensor) -> Tensor:
    if sampler._counts is None:
        return logits
    generation_config = sampler.generation_config
    frequency, presence = generation_config.frequency_penalty, generation_config.presence_penalty
    return L.count_penalties(logits, sampler._counts.to(logits.dtype), frequency, presence)


def _forbidden(sampler: Sampler, logits: Tensor) -> Tensor:
    """The bias: `logit_bias`, banned tokens, and end-of-text where `ignore_eos` or `min_new_tokens` masks it."""
    if sampler._bias is not None:
        ids, values = sampler._bias
        logits = logits.clone()
        logits[:, ids] += values.to(logits.dtype)
    if sampler.position < sampler.generation_config.min_new_tokens and sampler._end_ids:
        logits = logits.clone()
        logits[:, sampler._end_ids] = -math.inf
    return logits


def _temperature(sampler: Sampler, logits: Tensor) -> Tensor:
    generation_config = sampler.generation_config
    return logits if generation_config.greedy else L.temperature(logits, generation_config.temperature)


def _top_k(sampler: Sampler, logits: Tensor) -> Tensor:
    """Not in strategies for which `top_k` is the number of candidates that they compare."""
    generation_config = sampler.generation_config
    if generation_config.greedy or generation_config.top_k is None:
        return logits
    return logits if generation_config.candidates else L.top_k(logits, generation_config.top_k)


def _top_p(sampler: Sampler, logits: Tensor) -> Tensor:
    generation_config = sampler.generation_config
    unused = generation_config.greedy or generation_config.top_p >= 1
    return logits if unused else L.top_p(logits, generation_config.top_p)


def _min_p(sampler: Sampler, logits: Tensor) -> Tensor:
    generation_config = sampler.generation_config
    unused = generation_config.greedy or generation_config.min_p <= 0
    return logits if unused else L.min_p(logits, generation_config.min_p)


def _greedy(sampler: Sampler, logits: Tensor) -> Tensor:
    """The arg-max alone, where that is the choice."""
    if not sampler.takes_largest:
        return logits
    largest = L.argmax(logits)[:, None]
    return L.spread(logits.gather(-1, largest), largest, logits.size(-1))


PENALTIES = (
    Stage("repetition_penalty", _repetition_penalty),
    Stage("frequency_presence_penalty", _count_penalties),
    Stage("forbidden", _forbidden),
)
"""What depends on the text so far, and the bias."""

FILTERS = (
    Stage("temperature", _temperature),
    Stage("top_k", _top_k),
    Stage("top_p", _top_p),
    Stage("min_p", _min_p),
)
"""What depends on the logits alone; without effect in greedy decoding."""

STAGES = (*PENALTIES, *FILTERS, Stage("greedy", _greedy))
"""All of them in order. Their names say, wherever a token is shown, what cut it."""


def _apply(stages: Sequence[Stage], sampler: Sampler, logits: Tensor) -> Tensor:
    for stage in stages:
        logits = stage.apply(sampler, logits)
    return logits


# --- choosing ---------------------------------------------------------------------------------------------------------


def ranked(logits: Tensor, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of `token` and the `n` likeliest tokens as (id, log-probability), likeliest first.

    Args:
        logits: (V,).
        token: whose log-probability is wanted.
        n: how many of the likeliest; those with a probability of 0 are left out.
    """
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    top = tuple((i, value) for i, value in zip(ids.tolist(), values.tolist()) if value > -math.inf)
    return logprobs[token].item(), top


def choose_tokens(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """The next token of each continuation, from (B, V) logits, by arg-max or by drawing.

    All rows with the same filters go through one call of each. It chooses what the `STAGES` and a draw choose.
    Where penalties and bias leave nothing to choose from, because they forbid every token or overflow, that is `NONE`.
    """
    nothing: set[int] = set()
    if any(item.has_penalties for item in samplers):
        before, logits = logits, torch.empty_like(logits)
        for i, item in enumerate(samplers):  # into one tensor: `cat` of many temporaries costs ten times more
            logits[i] = item.apply_penalties(before[i : i + 1])[0]
        nothing = {i for i, fine in enumerate(logits.amax(-1).isfinite().tolist()) if not fine}
    groups: dict[str | tuple[int | None, bool, bool], list[int]] = {}
    for i, item in enumerate(samplers):
        if i in nothing:
            continue
        generation_config = item.generation_config
        filters = (generation_config.top_k, generation_config.top_p < 1, generation_config.min_p > 0)
        kind = "greedy" if generation_config.greedy else filters
        groups.setdefault(kind, []).append(i)
    chosen = [NONE] * len(samplers)
    for kind, members in groups.items():
        rows = logits if len(members) == len(samplers) else logits[members]
        tokens = L.argmax(rows) if kind == "greedy" else _draw([samplers[i] for i in members], rows)
        for i, token in zip(members, tokens.tolist()):
            chosen[i] = token
    return chosen


def _draw(samplers: list[Sampler], logits: Tensor) -> Tensor:
    """(B,) tokens for continuations that differ in numbers but not in which filters they have."""
    uniforms = torch.tensor([[item.uniform()] for item in samplers], dtype=L.widest(logits)).to(logits.device)
    logits, ids = candidates(samplers, logits)
    indices = L.choose(logits, uniforms)
    return indices if ids is None else ids.gather(-1, indices[:, None])[:, 0]


def candidates(samplers: Sequence[Sampler], logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """The filters for many rows at once: what a draw inverts the cumulative sum of.

    Args:
        samplers: B of them that draw and have the same filters with the same top-k; the other numbers may differ.
        logits: (B, V) after penalties and bias.

    Returns:
        (B, n) logits after the filters, and the (B, n) ids of their columns; None where these are all ids in order.
    """
    first = samplers[0].generation_config
    columns = [
        [item.generation_config.temperature, item.generation_config.top_p, item.generation_config.min_p]
        for item in samplers
    ]
    numbers = torch.tensor(columns, dtype=L.widest(logits)).to(logits.device)[:, :, None]
    temperature, top_p, min_p = numbers.to(logits.dtype).unbind(1)
    logits = L.temperature(logits, temperature)
    ids = None
    if first.top_k is not None or first.top_p < 1:
        logits, ids, total = L.shortlist(logits, first.top_k, top_p)
        if first.top_p < 1:
            logits = L.nucleus(logits, top_p, total)
    if first.min_p > 0:
        logits = L.min_p(logits, min_p)
    return logits, ids


def _bias(
    generation_config: GenerationConfig, end_ids: list[int], device: torch.device | str
) -> tuple[Tensor, Tensor] | None:
    """The ids whose logits change at every position, (n,), and what is added to them, (n,); or None."""
    forbidden = [*generation_config.banned_tokens, *(end_ids if generation_config.ignore_eos else ())]
    bias = generation_config.logit_bias | dict.fromkeys(forbidden, -math.inf)
    if not bias:
        return None
    ids = torch.tensor(list(bias), device=device)
    return ids, torch.tensor(list(bias.values()), dtype=L.widest(ids), device=device)
