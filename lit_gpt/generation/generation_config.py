"""The generation settings: every knob of text generation with its default and limits. Imports no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

from lit_gpt.errors import UserError, nearest
from lit_gpt.generation.strategy_table import SAMPLING, STRATEGIES, StrategySpec

# mypy cannot read the table; the parser of the flags can, and offers its names.
StrategyName: TypeAlias = Literal[tuple(STRATEGIES)]  # type: ignore[valid-type]
Overflow = Literal["slide", "stop"]

NGRAM = "ngram"
"""The draft that needs no checkpoint: look-up in the text so far."""


@dataclass(frozen=True)
class GenerationConfig:
    """How to continue a prompt. The names are the flags of `predict` and the keywords of `generate`.

    The order in which the knobs act on the logits is documented in `lit_gpt.generation.logits`.

    Attributes:
        strategy: what decides the tokens.
        max_new_tokens: the most tokens to write; 0 only scores the prompt.
        min_new_tokens: end-of-text is masked until this many tokens are out.
        num_samples: continuations of each prompt. `sample` draws them with seeds seed, seed + 1, …; `beam` returns its
            best ones.
        temperature: logits are divided by it; 0 means greedy.
        top_k: keep the k largest logits; null keeps all. The number of candidates in `contrastive` (4 if null) and
            `mcts` (8 if null).
        top_p: keep the smallest set of tokens with at least this mass.
        min_p: keep tokens with at least this share of the largest probability.
        repetition_penalty: logits of tokens in the prompt or output are divided by it if positive, multiplied if
            negative; 1 changes nothing (CTRL, arXiv 1909.05858).
        frequency_penalty: subtracted from a token's logit for each time it was generated.
        presence_penalty: subtracted once from the logit of every generated token.
        logit_bias: token id → what to add to its logit.
        banned_tokens: ids that are never generated.
        stop: text that ends the continuation and is not part of it; one string or several.
        stop_token_ids: ids that end it as end-of-text does.
        ignore_eos: never generate end-of-text.
        seed: of the random draws, which depend on it and on the position alone; null draws a fresh one.
        overflow: what happens after `block_size` tokens: the window slides, or the continuation stops.
        logprobs: null, or how many of the likeliest tokens to report at each position besides the chosen one.
        prompt_logprobs: the same for the tokens of the prompt.
        num_beams: hypotheses that `beam` keeps.
        length_penalty: `beam` compares sums of log-probabilities divided by length to this power.
        penalty_alpha: weight of the degeneration penalty in `contrastive`; 0 is greedy.
        num_simulations: walks through the tree for each token of `mcts`.
        c_puct: weight of exploration in `mcts`.
        rollout_length: greedy tokens that `mcts` looks ahead from a leaf.
        draft: what proposes tokens to `speculative`: `ngram`, or a checkpoint with the same tokenizer.
        num_draft_tokens: tokens it proposes at a time.
    """

    strategy: StrategyName = "sample"
    max_new_tokens: int = 200
    min_new_tokens: int = 0
    num_samples: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    banned_tokens: list[int] = field(default_factory=list)
    stop: list[str] | str = field(default_factory=list)
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    seed: int | None = None
    overflow: Overflow = "slide"
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    num_beams: int = 4
    length_penalty: float = 1.0
    penalty_alpha: float = 0.6
    num_simulations: int = 32
    c_puct: float = 1.0
    rollout_length: int = 8
    draft: str = NGRAM
    num_draft_tokens: int = 4

    @property
    def stops(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop)

    @property
    def spec(self) -> StrategySpec:
        """The strategy's entry in the table."""
        return STRATEGIES[self.strategy]

    @property
    def greedy(self) -> bool:
        """Whether the next token is the arg-max of the processed logits and nothing is drawn."""
        return self.temperature == 0 or STRATEGIES[self.strategy].greedy

    @property
    def candidates(self) -> int:
        """Tokens that `contrastive` compares and `mcts` expands; 0 where `top_k` is a filter."""
        return self._count("top_k") if "top_k" in self.spec.defaults else 0

    @property
    def sequences(self) -> int:
        """Cached sequences that one generation needs at most."""
        return 1 if self.spec.sequences is None else self._count(self.spec.sequences)

    @property
    def generations(self) -> int:
        """Independent generations that one request starts: `beam` finds all its samples in one."""
        return 1 if self.spec.one_search else self.num_samples

    @property
    def draft_checkpoint(self) -> str | None:
        """The checkpoint that proposes tokens, if the strategy uses one."""
        return self.draft if "draft" in self.spec.knobs and self.draft != NGRAM else None

    def _count(self, knob: str) -> int:
        """A knob that counts something, with the strategy's default."""
        return getattr(self, knob) or self.spec.defaults.get(knob, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GenerationConfig:
        """The inverse of `to_dict`; what is left out takes its default.

        Raises:
            UserError: for an unknown name, with the nearest right one.
        """
        known = [item.name for item in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise UserError(f'unknown generation option "{key}": {nearest(key, known)}')
        return cls(**values)

    def check(self) -> list[str]:
        """Check every value, and that the values go together.

        Returns:
            One line for each knob that is set and has no effect with this strategy.

        Raises:
            UserError: naming the knob, its value and the remedy.
        """
        for name, choices in (("strategy", tuple(STRATEGIES)), ("overflow", get_args(Overflow))):
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name}={getattr(self, name)!r} is unknown: {nearest(str(getattr(self, name)), choices)}"
                )
        self._check_ranges()
        self._check_strings_and_ids()
        self._check_combinations()
        return self._without_effect()

    def _check_ranges(self) -> None:
        for name, least in _LEAST_WHOLE.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"{name}={value!r} must be a whole number of at least {least}")
        for name, (low, high, interval) in _RANGES.items():
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and math.isfinite(value)
            if not number or not low <= value <= high or (value == low and interval[0] == "("):
                raise UserError(f"{name}={value!r} is outside {interval}: choose a value in it")
        if self.seed is not None and (not isinstance(self.seed, int) or isinstance(self.seed, bool)):
            raise UserError(f"seed={self.seed!r} must be a whole number")

    def _check_strings_and_ids(self) -> None:
        if any(not isinstance(text, str) or not text for text in self.stops):
            raise UserError(
                "stop has an empty string, which stands everywhere: leave it out or write the text to stop at"
            )
        for name in ("banned_tokens", "stop_token_ids", "logit_bias"):
            for token in getattr(self, name):
                if not isinstance(token, int) or isinstance(token, bool) or token < 0:
                    raise UserError(f"{name} has {token!r}: token ids are whole numbers of at least 0")
        for token, bias in self.logit_bias.items():
            if not isinstance(bias, (int, float)) or math.isnan(bias) or bias == math.inf:
                raise UserError(f"logit_bias of token {token} is {bias!r}: it must be a number below infinity")

    def _check_combinations(self) -> None:
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens={self.min_new_tokens} exceeds max_new_tokens={self.max_new_tokens}: lower it"
            )
        if self.spec.check is not None:
            self.spec.check(self)

    def _without_effect(self) -> list[str]:
        """Knobs that differ from their default and do nothing here."""
        used = self.spec.knobs - SAMPLING if self.greedy else self.spec.knobs
        defaults = GenerationConfig()
        idle = [
            name
            for name in sorted(set().union(*(spec.knobs for spec in STRATEGIES.values())))
            if name not in used and getattr(self, name) != getattr(defaults, name)
        ]
        if self.temperature == 0 and "temperature" in idle:
            idle.remove("temperature")  # it is what made this greedy
        plain = self.spec.knobs <= SAMPLING  # it has no knobs of its own
        how = "greedy decoding" if self.greedy and plain else f"strategy {self.strategy}"
        return [f"{name}={getattr(self, name)!r} has no effect with {how}" for name in idle]


_OPTIONAL = {"top_k", "logprobs", "prompt_logprobs"}
_LEAST_WHOLE = {
    "max_new_tokens": 0,
    "min_new_tokens": 0,
    "num_samples": 1,
    "top_k": 1,
    "logprobs": 0,
    "prompt_logprobs": 0,
    "num_beams": 1,
    "num_simulations": 1,
    "rollout_length": 0,
    "num_draft_tokens": 1,
}
_INF = math.inf
_RANGES: dict[str, tuple[float, float, str]] = {
    "temperature": (0.0, _INF, "[0, ∞)"),
    "top_p": (0.0, 1.0, "(0, 1]"),
    "min_p": (0.0, 1.0, "[0, 1]"),
    "repetition_penalty": (0.0, _INF, "(0, ∞)"),
    "frequency_penalty": (-_INF, _INF, "(-∞, ∞)"),
    "presence_penalty": (-_INF, _INF, "(-∞, ∞)"),
    "length_penalty": (-_INF, _INF, "(-∞, ∞)"),
    "penalty_alpha": (0.0, 1.0, "[0, 1]"),
    "c_puct": (0.0, _INF, "[0, ∞)"),
}
