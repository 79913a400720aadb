"""The processors of one continuation: its settings, what it has said so far, and how both change its logits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Token

NONE = -1
"""In place of a token: there is none to choose."""

Observer = Callable[["Sampler", Tensor, Token], None]
"""Takes note of a decision: the processors in their state before it, the raw logits (V,), and the token."""


class Sampler:
    """Applies a `GenerationConfig` to the logits of one continuation, in the order of `lit_gpt.generation.logits`.

    Attributes:
        generation_config: the settings.
        seed: of this continuation's draws.
        position: how many tokens it has generated.
        observer: called with (these processors, raw logits (V,), token) for each token that is decided on; or None.
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
        """Processors of a continuation that has not begun.

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
        self._bias = _bias(generation_config, [token for token in eot_ids if token < n_vocab], n_vocab, device)

    def fork(self) -> Sampler:
        """A copy that goes its own way."""
        twin = copy.copy(self)
        twin._counts = None if self._counts is None else self._counts.clone()
        twin._seen = None if self._seen is None else self._seen.clone()
        return twin

    def walk(self, path: Sequence[int]) -> Sampler:
        """A copy for which `path` was generated too."""
        twin = self.fork()
        for token in path:
            twin.observe(token)
        return twin

    def observe(self, token: int) -> None:
        """`token` was generated."""
        self.position += 1
        if self._counts is not None:
            self._counts[token] += 1
        if self._seen is not None:
            self._seen[token] = True

    @cached_property
    def _changing(self) -> bool:
        """Whether the adjustment depends on the tokens generated so far."""
        return self._counts is not None or self._seen is not None

    @property
    def idle(self) -> bool:
        """Whether `apply_penalties` leaves the next token's logits as they are."""
        return self._bias is None and not self._changing and self.position >= self.generation_config.min_new_tokens

    def apply_penalties(self, logits: Tensor, path: Sequence[int] = ()) -> Tensor:
        """Penalties and bias on (n, V) logits, of which row i comes after the first i tokens of `path`."""
        if self.idle:
            return logits
        if len(logits) == 1:
            return self._apply_penalties_to_one(logits)
        walker, rows = self.fork(), []
        for i in range(len(logits)):
            rows.append(walker._apply_penalties_to_one(logits[i : i + 1]))
            if i < len(path):
                walker.observe(path[i])
        return torch.cat(rows)

    def _apply_penalties_to_one(self, logits: Tensor) -> Tensor:
        if self._seen is not None:
            logits = L.repetition_penalty(logits, self._seen, self.generation_config.repetition_penalty)
        if self._counts is not None:
            frequency, presence = self.generation_config.frequency_penalty, self.generation_config.presence_penalty
            logits = L.count_penalties(logits, self._counts.to(logits.dtype), frequency, presence)
        if self._bias is not None:
            logits = logits + self._bias.to(logits.dtype)
        if self.position < self.generation_config.min_new_tokens and self._end_ids:
            logits = logits.clone()
            logits[:, self._end_ids] = -math.inf
        return logits

    def process(self, logits: Tensor, path: Sequence[int] = ()) -> Tensor:
        """All of it: the (n, V) logits that the next token is drawn from, given rows as `apply_penalties` takes them.

        With a temperature of 0 it is the penalties and the bias only, and the arg-max is what counts.
        """
        generation_config = self.generation_config
        logits = self.apply_penalties(logits, path)
        if generation_config.greedy:
            return logits
        logits = L.temperature(logits, generation_config.temperature)
        if generation_config.top_k is not None and generation_config.strategy not in ("contrastive", "mcts"):
            logits = L.top_k(logits, generation_config.top_k)
        if generation_config.top_p < 1:
            logits = L.top_p(logits, generation_config.top_p)
        if generation_config.min_p > 0:
            logits = L.min_p(logits, generation_config.min_p)
        return logits

    def uniform(self, purpose: str = "token", ahead: int = 0) -> float:
        """The random number of the position `ahead` tokens from now."""
        return L.uniform(self.seed, self.position + ahead, purpose)

    def report(self, raw: Tensor, token: int) -> Token:
        """`token`, chosen where the model said `raw` (V,), with the log-probabilities that were asked for."""
        n, reported = self.generation_config.logprobs, Token(token)
        if n is not None:
            logprob, top = ranked(raw, token, n)
            shaped_logprob, shaped_top = ranked(self.process(raw[None])[0], token, n)
            reported = Token(token, logprob, shaped_logprob, top, shaped_top)
        if self.observer is not None:
            self.observer(self, raw, reported)
        return reported


def ranked(logits: Tensor, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of `token` and the `n` likeliest (id, log-probability), from (V,) logits."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n, len(logprobs)))
    top = tuple((i, value) for i, value in zip(ids.tolist(), values.tolist()) if value > -math.inf)
    return logprobs[token].item(), top


def choose_tokens(samplers: Sequence[Sampler], logits: Tensor) -> list[int]:
    """The next token of each continuation, from (B, V) logits, by arg-max or by drawing.

    All rows with the same top-k go through one call of every processor. It chooses what drawing from `process` chooses.
    Where penalties and bias leave nothing to choose from, because they forbid every token or overflow, that is `NONE`.
    """
    nothing: set[int] = set()
    if any(not item.idle for item in samplers):
        logits = torch.cat([item.apply_penalties(row[None]) for item, row in zip(samplers, logits)])
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
    places = L.choose(logits, uniforms)
    return places if ids is None else ids.gather(-1, places[:, None])[:, 0]


def candidates(samplers: Sequence[Sampler], logits: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a draw inverts the cumulative sum of: (B, n) shaped logits, and their ids where they are in another order.

    Args:
        samplers: that have the same filters.
        logits: (B, V), adjusted.
    """
    first = samplers[0].generation_config
    columns = [
        [item.generation_config.temperature, item.generation_config.top_p, item.generation_config.min_p]
        for item in samplers
    ]
    numbers = torch.tensor(columns, dtype=L.widest(logits)).to(logits.device)[:, :, None]
    heat, share, least = numbers.unbind(1)
    logits = L.temperature(logits, heat.to(logits.dtype))
    ids = None
    if first.top_k is not None or first.top_p < 1:
        logits, ids, total = L.shortlist(logits, first.top_k, share.to(logits.dtype))
        if first.top_p < 1:
            logits = L.nucleus(logits, share.to(logits.dtype), total)
    if first.min_p > 0:
        logits = L.min_p(logits, least.to(logits.dtype))
    return logits, ids


def _bias(
    generation_config: GenerationConfig, end_ids: list[int], n_vocab: int, device: torch.device | str
) -> Tensor | None:
    """(V,) what is added to the logits at every position, or None."""
    if not (
        generation_config.logit_bias or generation_config.banned_tokens or (generation_config.ignore_eos and end_ids)
    ):
        return None
    bias = torch.zeros(n_vocab, dtype=torch.float64, device=device)
    for token, value in generation_config.logit_bias.items():
        bias[token] += value
    bias[list(generation_config.banned_tokens)] = -math.inf
    if generation_config.ignore_eos:
        bias[end_ids] = -math.inf
    return bias
