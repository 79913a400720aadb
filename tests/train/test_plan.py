"""What `model.preset: auto` makes of a text, a time and a machine."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.model.config import GPTConfig
from lit_gpt.train.plan import SHAPES, TextPlan, plan_for_text, vocabulary_for

SIZES, SECONDS, RATES = st.integers(1, 10**10), st.floats(1, 1e6), st.floats(1e9, 1e15)


def weights(planned: TextPlan) -> int:
    return GPTConfig.from_dict({**planned.config, "vocab_size": planned.vocabulary}).least_weights()


@given(SIZES, SECONDS, RATES, st.floats(1, 100))
def test_more_time_never_makes_a_smaller_model(size: int, seconds: float, rate: float, factor: float) -> None:
    before, after = plan_for_text(size, seconds, rate), plan_for_text(size, seconds * factor, rate)
    assert weights(after) >= weights(before) and after.vocabulary == before.vocabulary
    assert (
        after.config == plan_for_text(size, seconds, rate * factor).config
    )  # a faster machine is as good as more time


@given(SIZES, SIZES)
def test_a_longer_text_never_has_a_smaller_vocabulary(one: int, other: int) -> None:
    few, many = (vocabulary_for(size) for size in sorted((one, other)))
    assert 257 < few <= many and few & (few - 1) == many & (many - 1) == 0


@pytest.mark.parametrize(
    ("size", "vocabulary", "dropout"),
    [(300_000, 1024, 0.2), (700_000, 2048, 0.1), (1_234_623, 2048, 0.1), (5_000_000, 4096, 0.0)],
)
def test_three_minutes_of_two_cores_are_what_was_measured(size: int, vocabulary: int, dropout: float) -> None:
    """At 400 GFLOP/s: the shape with the lowest loss in docs/benchmarks.md, and its epochs (5.3 of 1.2 MB)."""
    planned = plan_for_text(size, 165, 4e11)
    assert (planned.config["n_layer"], planned.config["n_embd"], planned.vocabulary) == (4, 128, vocabulary)
    assert planned.config["dropout"] == dropout and planned.config["attn_dropout"] == 0
    epochs = re.search(r"or ([\d.]+) epochs", planned.reason)
    assert epochs is not None and (size != 1_234_623 or 5 < float(epochs[1]) < 6)


def test_twice_the_time_is_a_wider_model() -> None:
    """The FLOP that two faster cores make in 165 s: 3 × 192 had the lowest loss with 红楼梦 and tinyshakespeare."""
    planned = plan_for_text(1_620_000, 165, 7.5e11, characters=4_500)
    assert (planned.config["n_layer"], planned.config["n_embd"], planned.config["n_head"]) == (3, 192, 3)
    assert planned.vocabulary == 4096 and planned.config["dropout"] == 0.1


@pytest.mark.parametrize(
    ("characters", "vocabulary"), [(0, 2048), (120, 2048), (2_800, 2048), (4_742, 4096), (10**5, 8192)]
)
def test_a_text_of_many_characters_gets_as_many_tokens(characters: int, vocabulary: int) -> None:
    assert vocabulary_for(1_200_000, characters) == vocabulary


def test_every_shape_is_some_times_best() -> None:
    found = {tuple(plan_for_text(10**6, 2.0**e, 1e11).config[key] for key in ("n_layer", "n_embd")) for e in range(30)}
    assert found == set(SHAPES)


@pytest.mark.parametrize(("size", "seconds", "rate"), [(1, 1.0, 1.0), (10**12, 1e7, 1e17)])
def test_the_extremes_are_models_too(size: int, seconds: float, rate: float) -> None:
    assert weights(plan_for_text(size, seconds, rate)) > 0
