"""Each function of logits against transformers' and closed forms; draws in blocks against plain ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from lit_gpt.generation import logits as L

IDS = torch.zeros(1, 1, dtype=torch.long)  # transformers' warpers take ids and ignore them


@st.composite
def logits(draw: Any, most: int = 700) -> Tensor:
    """(B, V) float64, some of them far apart; more than one block of the vocabulary at times."""
    seed, B, V = draw(st.integers(0, 10_000)), draw(st.integers(1, 3)), draw(st.integers(1, most))
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * draw(
        st.sampled_from([0.1, 1.0, 8.0])
    )


def same(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@given(logits(), st.integers(1, 800))
@settings(deadline=None, max_examples=50)
def test_top_k_keeps_what_transformers_keeps(x: Tensor, k: int) -> None:
    before = x.clone()
    same(L.top_k(x, k), TopKLogitsWarper(k)(IDS, x))
    assert torch.equal(x, before)


def test_top_k_cuts_ties_to_exactly_k() -> None:
    assert L.top_k(torch.tensor([[1.0, 1.0, 1.0, 0.0]]), 2).isfinite().sum() == 2


@pytest.mark.slow
@given(logits(), st.floats(0.001, 0.999))
@settings(deadline=None, max_examples=80)
def test_top_p_keeps_what_transformers_keeps(x: Tensor, p: float) -> None:
    before = x.clone()
    same(L.top_p(x, p), TopPLogitsWarper(p)(IDS, x))
    assert torch.equal(x, before)


def test_top_p_is_the_smallest_set_and_counts_each_row_by_itself() -> None:
    x = torch.tensor([[0.5, 0.3, 0.2], [0.98, 0.01, 0.01]], dtype=torch.float64).log()
    assert L.top_p(x, 0.6).isfinite().tolist() == [[True, True, False], [True, False, False]]
    assert L.top_p(x, torch.tensor([[1e-9], [0.985]])).isfinite().tolist() == [
        [True, False, False],
        [True, True, False],
    ]


def test_top_p_of_a_flat_distribution_looks_beyond_the_first_tokens() -> None:
    assert L.top_p(torch.zeros(1, 1000, dtype=torch.float64), 0.8995).isfinite().sum() == 900


@given(logits(), st.floats(0.001, 1.0))
@settings(deadline=None, max_examples=50)
def test_min_p_keeps_what_transformers_keeps(x: Tensor, p: float) -> None:
    before = x.clone()
    same(L.min_p(x, p), MinPLogitsWarper(p)(IDS, x))
    assert torch.equal(x, before)


@given(logits(), st.floats(0.05, 20.0))
@settings(deadline=None, max_examples=30)
def test_temperature_equals_transformers(x: Tensor, value: float) -> None:
    same(L.temperature(x, value), TemperatureLogitsWarper(value)(IDS, x))


def test_temperature_closed_form() -> None:
    x = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
    expected = torch.tensor([[0.636, 0.234, 0.086, 0.032, 0.012]])
    torch.testing.assert_close(L.temperature(x, 1.0).softmax(-1), expected, atol=5e-4, rtol=0)
    sharp = torch.tensor([0.8647, 0.1170, 0.0158])
    torch.testing.assert_close(L.temperature(x, 0.5).softmax(-1)[0, :3], sharp, atol=5e-5, rtol=0)


@given(logits(), st.floats(0.1, 5.0), st.data())
@settings(deadline=None, max_examples=50)
def test_repetition_penalty_equals_transformers(x: Tensor, penalty: float, data: Any) -> None:
    V = x.size(-1)
    text = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=20))
    before, seen = x.clone(), torch.zeros(V, dtype=torch.bool)
    seen[text] = True
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text] * len(x)), x)
    same(L.repetition_penalty(x, seen, penalty), theirs)
    assert torch.equal(x, before)


@given(logits(), st.floats(-2, 2), st.floats(-2, 2), st.data())
@settings(deadline=None, max_examples=30)
def test_frequency_and_presence_penalties_closed_form(x: Tensor, frequency: float, presence: float, data: Any) -> None:
    V = x.size(-1)
    generated = data.draw(st.lists(st.integers(0, V - 1), max_size=20))
    expected = x.clone()
    for token in set(generated):
        expected[:, token] -= frequency * generated.count(token) + presence
    counts = torch.bincount(torch.tensor(generated, dtype=torch.long), minlength=V).double()
    torch.testing.assert_close(L.count_penalties(x, counts, frequency, presence), expected)


@given(logits())
@settings(deadline=None, max_examples=30)
def test_argmax_and_draws_in_blocks_equal_the_plain_ones(x: Tensor) -> None:
    assert torch.equal(L.argmax(x), x.argmax(-1))
    uniforms = torch.rand(len(x), 1, dtype=torch.float64)
    cumulative = x.softmax(-1).cumsum(-1)
    plain = torch.searchsorted(cumulative, uniforms * cumulative[:, -1:], right=True)[:, 0]
    assert torch.equal(L.choose(x, uniforms), plain)


@given(logits(most=600), st.floats(0, 1 - 2**-52))
@settings(deadline=None, max_examples=60)
def test_a_token_that_was_cut_is_never_drawn(x: Tensor, uniform: float) -> None:
    x = x.masked_fill(torch.rand_like(x) < 0.7, -math.inf)
    x[:, 0] = 0.0
    for u in (uniform, 0.0, 1 - 2**-52):
        drawn = L.choose(x.float(), torch.full((len(x), 1), u, dtype=torch.float64))
        assert bool(x.gather(-1, drawn[:, None]).isfinite().all())


def test_uniform_numbers_are_uniform_and_of_their_position_only() -> None:
    numbers = [L.uniform(seed, position) for seed in range(50) for position in range(200)]
    assert min(numbers) >= 0 and max(numbers) < 1
    observed = torch.histc(torch.tensor(numbers, dtype=torch.float64), 20, 0, 1)
    assert chisquare(observed, [len(numbers) / 20] * 20).pvalue > 1e-3
    assert L.uniform(3, 5) == L.uniform(3, 5) != L.uniform(3, 5, "accept")
