"""The table of decoding strategies: for each its function, cache slots, knobs, defaults and checks. Imports no torch.

A strategy is one file in `strategies/` and one entry here. The flags and their help, the checks of settings, the engine
and the comparison script read the table. It is not in the package `strategies`, because `GenerationConfig` reads it and
strategies read `GenerationConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

from lit_gpt.errors import UserError

FILTERS = frozenset({"top_k", "top_p", "min_p"})
"""Knobs that leave fewer tokens to choose from."""

SAMPLING = FILTERS | {"temperature", "seed"}
"""Knobs of the random draw."""


class _Settings(Protocol):
    """The fields of a `GenerationConfig` that the checks here read."""

    @property
    def strategy(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def num_samples(self) -> int: ...
    @property
    def num_beams(self) -> int: ...
    @property
    def draft(self) -> str: ...


@dataclass(frozen=True)
class StrategySpec:
    """One strategy.

    Attributes:
        function: where its function is, "module:name"; it is imported when it is first asked for.
        knobs: the fields of `GenerationConfig` that it uses, besides those that every strategy uses.
        defaults: what a knob that is null means here. A default for `top_k` makes it the number of candidates that the
            strategy compares, and not a filter.
        sequences: the knob that says how many sequences one generation needs at most; None for one sequence.
        greedy: whether nothing is ever drawn, whatever the temperature.
        one_draw: whether each token is drawn from the processed distribution by one random number, unless greedy.
        one_search: whether all samples of a request come out of one generation.
        check: refuses settings that make no sense with it, by a `UserError`.
    """

    function: str
    knobs: frozenset[str]
    defaults: Mapping[str, int] = field(default_factory=dict)
    sequences: str | None = None
    greedy: bool = False
    one_draw: bool = False
    one_search: bool = False
    check: Callable[[_Settings], None] | None = None

    def load(self) -> Callable[[Any], Any]:
        """Its function, a `lit_gpt.generation.generation.Strategy`, which to name as the type would import torch."""
        module, name = self.function.split(":")
        return getattr(import_module(module), name)


def _check_beam(settings: _Settings) -> None:
    if settings.temperature == 0:
        raise UserError("beam with temperature=0 compares infinities: leave temperature at 1, or use greedy")
    if settings.num_samples > settings.num_beams:
        raise UserError(
            f"num_samples={settings.num_samples} exceeds num_beams={settings.num_beams}: "
            f"beam can return as many as it keeps; raise num_beams"
        )


def _check_one_sample(settings: _Settings) -> None:
    if settings.num_samples > 1:
        raise UserError(
            f"{settings.strategy} draws nothing, so all {settings.num_samples} samples would be equal: use sample"
        )


def _check_contrastive(settings: _Settings) -> None:
    _check_one_sample(settings)
    if settings.temperature == 0:
        raise UserError("contrastive with temperature=0 leaves one candidate: use greedy, or leave temperature at 1")


def _check_speculative(settings: _Settings) -> None:
    if not settings.draft:
        raise UserError("speculative needs a draft: a checkpoint with the same tokenizer, or ngram")


STRATEGIES: dict[str, StrategySpec] = {
    "sample": StrategySpec("lit_gpt.generation.strategies.sample:sample", knobs=SAMPLING, one_draw=True),
    "greedy": StrategySpec("lit_gpt.generation.strategies.sample:sample", knobs=frozenset(), greedy=True),
    "beam": StrategySpec(
        "lit_gpt.generation.strategies.beam:beam",
        knobs=FILTERS | {"temperature", "num_beams", "length_penalty"},
        sequences="num_beams",
        one_search=True,
        check=_check_beam,
    ),
    "contrastive": StrategySpec(
        "lit_gpt.generation.strategies.contrastive:contrastive",
        knobs=FILTERS | {"temperature", "penalty_alpha"},
        defaults={"top_k": 4},
        sequences="top_k",
        check=_check_contrastive,
    ),
    "mcts": StrategySpec(
        "lit_gpt.generation.strategies.mcts:mcts",
        knobs=FILTERS | {"temperature", "num_simulations", "c_puct", "rollout_length"},
        defaults={"top_k": 8},
        check=_check_one_sample,
    ),
    "speculative": StrategySpec(
        "lit_gpt.generation.strategies.speculative:speculative",
        knobs=SAMPLING | {"draft", "num_draft_tokens"},
        check=_check_speculative,
    ),
}
"""By name, in the order of the help."""
