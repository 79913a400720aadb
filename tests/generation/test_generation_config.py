"""Every knob's limits, and which go together."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.strategy_table import STRATEGIES


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy": "beem"}, "strategy='beem' is unknown: did you mean \"beam\"?"),
        ({"temperature": -0.1}, r"temperature=-0.1 is outside \[0, ∞\)"),
        ({"temperature": float("nan")}, "temperature=nan is outside"),
        ({"top_p": 0.0}, r"top_p=0.0 is outside \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 is outside \(0, 1\]"),
        ({"top_k": 0}, "top_k=0 must be a whole number of at least 1"),
        ({"min_p": 1.5}, "min_p=1.5 is outside"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 is outside"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be a whole number of at least 0"),
        ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens=9 exceeds max_new_tokens=5"),
        ({"num_samples": 0}, "num_samples=0 must be"),
        ({"stop": ""}, "stop has an empty string"),
        ({"stop": ["a", ""]}, "stop has an empty string"),
        ({"logit_bias": {-1: 1.0}}, "logit_bias has -1"),
        ({"logit_bias": {1: float("nan")}}, "logit_bias of token 1 is nan"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"strategy": "beam", "temperature": 0}, "beam with temperature=0 compares infinities"),
        ({"strategy": "beam", "num_samples": 5}, "num_samples=5 exceeds num_beams=4"),
        ({"strategy": "contrastive", "num_samples": 2}, "contrastive draws nothing"),
        ({"strategy": "contrastive", "temperature": 0}, "contrastive with temperature=0 leaves one candidate"),
        ({"strategy": "mcts", "num_samples": 2}, "mcts draws nothing"),
        ({"strategy": "speculative", "draft": ""}, "speculative needs a draft"),
        ({"strategy": "contrastive", "penalty_alpha": 1.1}, "penalty_alpha=1.1 is outside"),
        ({"overflow": "wrap"}, "overflow='wrap' is unknown"),
    ],
)
def test_wrong_values_are_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        GenerationConfig(**values).check()
    assert "\n" not in str(error.value)


def test_every_default_is_right_and_every_strategy_has_its_defaults() -> None:
    for strategy in STRATEGIES:
        assert GenerationConfig(strategy=strategy).check() == []


def test_knobs_without_effect_are_named() -> None:
    assert GenerationConfig(strategy="greedy", top_p=0.5).check() == ["top_p=0.5 has no effect with greedy decoding"]
    assert GenerationConfig(temperature=0, top_k=3).check() == ["top_k=3 has no effect with greedy decoding"]
    assert GenerationConfig(num_beams=7).check() == ["num_beams=7 has no effect with strategy sample"]
    assert GenerationConfig(strategy="beam", seed=1).check() == ["seed=1 has no effect with strategy beam"]
    assert GenerationConfig(temperature=0.7, top_k=3, seed=4).check() == []


def test_plain_values_and_back() -> None:
    generation_config = GenerationConfig(strategy="beam", stop=["x"], logit_bias={3: 1.0})
    assert GenerationConfig.from_dict(generation_config.to_dict()) == generation_config
    with pytest.raises(UserError, match=r'unknown generation option "temprature": did you mean "temperature"\?'):
        GenerationConfig.from_dict({"temprature": 1})


def test_every_knob_is_documented() -> None:
    text = GenerationConfig.__doc__ or ""
    assert [field.name for field in dataclasses.fields(GenerationConfig) if f"        {field.name}: " not in text] == []
