"""Each processor against transformers', closed forms, and drawing against the distribution it draws from."""

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
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.sampling import Sampler, choose_tokens, ranked

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
def test_a_token_that_is_out_is_never_drawn(x: Tensor, uniform: float) -> None:
    x = x.masked_fill(torch.rand_like(x) < 0.7, -math.inf)
    x[:, 0] = 0.0
    for u in (uniform, 0.0, 1 - 2**-52):
        drawn = L.choose(x.float(), torch.full((len(x), 1), u, dtype=torch.float64))
        assert bool(x.gather(-1, drawn[:, None]).isfinite().all())


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"top_k": 3},
    {"top_p": 0.8},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.7, "min_p": 0.1, "temperature": 1.3},
    {"repetition_penalty": 1.5, "frequency_penalty": 0.3, "presence_penalty": 0.2, "logit_bias": {1: 2.0}},
    {"banned_tokens": [0, 1], "ignore_eos": True, "top_p": 0.9},
]


def sampler(values: dict[str, Any], n_vocab: int, seed: int = 0) -> Sampler:
    generation_config = GenerationConfig(**values)
    generation_config.check()
    item = Sampler(generation_config, [0, 1, 1], n_vocab, frozenset([2]), frozenset([2]), seed)
    for token in (3, 0):
        item.observe(token)
    return item


@given(st.lists(st.sampled_from(SETTINGS), min_size=1, max_size=4), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_picking_together_is_drawing_from_each_shape(chosen: list[dict[str, Any]], seed: int) -> None:
    V = 40
    x = torch.randn(len(chosen), V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    items = [sampler(values, V, seed + i) for i, values in enumerate(chosen)]
    for item, row, token in zip(items, x, choose_tokens(items, x)):
        shaped = item.process(row[None])
        if item.generation_config.greedy:
            assert token == int(shaped.argmax())
            continue
        order = shaped.sort(descending=True, stable=True).indices[0]  # filters leave the largest first
        sorts = item.generation_config.top_k is not None or item.generation_config.top_p < 1
        line = shaped[0, order] if sorts else shaped[0]
        place = int(L.choose(line[None], torch.tensor([[item.uniform()]], dtype=torch.float64)))
        assert token == (int(order[place]) if sorts else place)


def test_the_order_of_the_processors() -> None:
    item = sampler({**SETTINGS[5], **SETTINGS[6]}, 40)
    x = torch.randn(1, 40, dtype=torch.float64)
    seen = torch.zeros(40, dtype=torch.bool)
    seen[[0, 1, 3]] = True
    counts = torch.zeros(40, dtype=torch.float64)
    counts[[3, 0]] = 1
    y = L.count_penalties(L.repetition_penalty(x, seen, 1.5), counts, 0.3, 0.2)
    y[:, 1] += 2.0
    y = L.min_p(L.top_p(L.top_k(y / 1.3, 5), 0.7), 0.1)
    torch.testing.assert_close(item.process(x), y)


def test_end_of_text_is_masked_until_enough_is_written() -> None:
    item = Sampler(GenerationConfig(min_new_tokens=2), [0], 4, frozenset([2]), frozenset([2]))
    x = torch.zeros(1, 4)
    for expected in (False, False, True):
        assert bool(item.process(x)[0, 2].isfinite()) is expected
        item.observe(1)


def test_shaping_along_a_path_is_shaping_step_by_step() -> None:
    item = sampler(SETTINGS[6], 12)
    x, path = torch.randn(3, 12, dtype=torch.float64), [5, 5]
    together = item.process(x, path)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], item.walk(path[:i]).process(x[i : i + 1]))


@pytest.mark.parametrize("values", [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.3}])
def test_draws_follow_the_distribution(values: dict[str, Any]) -> None:
    """Chi-square over 4,000 seeds at one position, and over 4,000 positions of one seed."""
    x = torch.tensor([[1.0, 0.2, -0.5, 0.7, -1.0]], dtype=torch.float64)
    by_seed = [sampler(values, 5, seed) for seed in range(4000)]
    wanderer = sampler(values, 5, 11)
    by_position = []
    for _ in range(4000):
        by_position.append(wanderer.fork())
        wanderer.position += 1
    expected = by_seed[0].process(x).softmax(-1)[0]
    possible = expected > 0
    for items in (by_seed, by_position):
        observed = torch.bincount(torch.tensor(choose_tokens(items, x.expand(4000, -1))), minlength=5)
        assert int(observed[~possible].sum()) == 0
        assert chisquare(observed[possible], 4000 * expected[possible]).pvalue > 1e-3


def test_uniform_numbers_are_uniform_and_of_their_position_only() -> None:
    numbers = [L.uniform(seed, position) for seed in range(50) for position in range(200)]
    assert min(numbers) >= 0 and max(numbers) < 1
    observed = torch.histc(torch.tensor(numbers, dtype=torch.float64), 20, 0, 1)
    assert chisquare(observed, [len(numbers) / 20] * 20).pvalue > 1e-3
    assert L.uniform(3, 5) == L.uniform(3, 5) != L.uniform(3, 5, "accept")


def test_chosen_and_top_logprobs_come_from_one_tensor() -> None:
    x = torch.randn(300)
    logprob, top = ranked(x, int(x.argmax()), 5)
    assert top[0] == (int(x.argmax()), logprob)
    assert [i for i, _ in top] == x.topk(5).indices.tolist()
    masked = torch.tensor([0.0, -math.inf, -math.inf])
    assert ranked(masked, 0, 3) == (0.0, ((0, 0.0),))
