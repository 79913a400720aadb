"""The stages one by one, the batched choice against them, and draws against the distribution they are drawn from."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from lit_gpt.generation import logits as L
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.sampling import NONE, STAGES, Sampler, candidates, choose_tokens, ranked

V = 40  # vocabulary of the tests that name no other
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


@st.composite
def generation_values(draw: Any) -> dict[str, Any]:
    """Settings of `GenerationConfig`, each knob at its default or drawn from its whole range."""

    def maybe(knob: st.SearchStrategy[Any], default: Any) -> Any:
        return draw(knob) if draw(st.booleans()) else default

    tokens = st.integers(0, V - 1)
    return {
        "strategy": draw(st.sampled_from(["sample", "sample", "sample", "greedy"])),
        "temperature": maybe(st.floats(0.05, 5.0) | st.just(0.0), 1.0),
        "top_k": maybe(st.integers(1, V + 5), None),
        "top_p": maybe(st.floats(0.01, 0.999), 1.0),
        "min_p": maybe(st.floats(0.001, 1.0), 0.0),
        "repetition_penalty": maybe(st.floats(0.3, 3.0), 1.0),
        "frequency_penalty": maybe(st.floats(-2.0, 2.0), 0.0),
        "presence_penalty": maybe(st.floats(-2.0, 2.0), 0.0),
        "logit_bias": maybe(st.dictionaries(tokens, st.floats(-5.0, 5.0), max_size=4), {}),
        "banned_tokens": maybe(st.lists(tokens, max_size=V) | st.just(list(range(V))), []),
        "ignore_eos": draw(st.booleans()),
        "min_new_tokens": draw(st.integers(0, 4)),
    }


def choose_by_stages(item: Sampler, row: Tensor) -> tuple[int, Tensor]:
    """The token that the stages and the same draw choose from (1, V) logits, and the (V,) mask of what they keep.

    Candidates that were sorted for top-k or top-p are drawn from in that order, the likeliest first.
    """
    stages = {stage.name: stage for stage in item.stages(row)}
    last = stages["greedy"].after
    if not bool(stages["forbidden"].after.amax().isfinite()):
        return NONE, last[0].isfinite()
    generation_config = item.generation_config
    sorts = not generation_config.greedy and (generation_config.top_k is not None or generation_config.top_p < 1)
    order = last[0].sort(descending=True, stable=True).indices if sorts else torch.arange(row.size(-1))
    drawn = L.choose(last[:, order], torch.tensor([[item.uniform()]], dtype=torch.float64))
    return int(order[drawn]), last[0].isfinite()


@pytest.mark.slow
@given(st.lists(generation_values(), min_size=1, max_size=5), st.integers(0, 10_000), st.data())
@settings(deadline=None, max_examples=80)
def test_the_batched_choice_is_that_of_the_stages(chosen: list[dict[str, Any]], seed: int, data: Any) -> None:
    """Some rows have the same filters and go through one call; the choice may not depend on the company.

    The larger vocabularies have more than one block, and more tokens than top-p sorts at first.
    """
    copies, n_vocab = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([V, 700, 1500]))
    scale = data.draw(st.sampled_from([0.1, 1.0, 8.0]))
    items = [sampler(values, n_vocab, seed + i) for i, values in enumerate(chosen * copies)]
    x = scale * torch.randn(len(items), n_vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for item, row, token in zip(items, x, choose_tokens(items, x)):
        expected, kept = choose_by_stages(item, row[None])
        assert token == expected
        if token == NONE:
            continue
        assert bool(kept[token])
        if item.generation_config.greedy:
            assert kept.sum() == 1
            continue
        values, ids = candidates([item], item.apply_penalties(row[None]))
        columns = torch.arange(n_vocab)[None] if ids is None else ids
        assert set(columns[values.isfinite()].tolist()) == set(kept.nonzero()[:, 0].tolist())
        assert torch.equal(item.process(row[None])[0].isfinite(), kept)


@pytest.mark.parametrize("strong", [{"top_k": 2}, {"top_p": 0.3}, {"min_p": 0.9}], ids=str)
def test_a_filter_is_not_shared_with_rows_that_lack_it(strong: dict[str, Any]) -> None:
    for others in ({}, {"top_k": 9}, {"top_p": 0.95}, {"min_p": 0.01}):
        items = [sampler(values, V, seed) for seed in range(10) for values in (others, others | strong)]
        x = torch.randn(len(items), V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        alone = [choose_tokens([item], row[None])[0] for item, row in zip(items, x)]
        assert choose_tokens(items, x) == alone


def test_every_stage_gets_what_the_one_before_made() -> None:
    item, x = sampler({**SETTINGS[5], **SETTINGS[6]}, V), torch.randn(1, V, dtype=torch.float64)
    results = list(item.stages(x))
    assert [one.name for one in results] == [stage.name for stage in STAGES]
    assert results[0].before is x
    assert all(after.before is before.after for before, after in pairwise(results))
    assert torch.equal(results[-1].after, item.process(x))


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"repetition_penalty": 1.3}, "repetition_penalty"),
        ({"presence_penalty": 0.5}, "frequency_presence_penalty"),
        ({"banned_tokens": [4]}, "forbidden"),
        ({"min_new_tokens": 5}, "forbidden"),
        ({"temperature": 0.7}, "temperature"),
        ({"top_k": 3}, "top_k"),
        ({"top_p": 0.5}, "top_p"),
        ({"min_p": 0.5}, "min_p"),
        ({"temperature": 0}, "greedy"),
        ({"strategy": "greedy", "top_k": 3, "min_p": 0.5}, "greedy"),
        ({"strategy": "speculative", "temperature": 0}, "greedy"),
    ],
)
def test_a_knob_is_at_work_in_the_stage_of_its_name(values: dict[str, Any], name: str) -> None:
    """Temperature 1 divides all the same, so that stage always gives a new tensor but when decoding is greedy."""
    item, x = sampler(values, V), torch.randn(1, V, dtype=torch.float64)
    assert {one.name for one in item.stages(x) if not torch.equal(one.before, one.after)} == {name}


def test_a_search_is_not_the_largest_logits_choice() -> None:
    item = sampler({"strategy": "mcts", "temperature": 0.0, "top_k": 3}, V)
    x = torch.randn(1, V, dtype=torch.float64)
    assert not item.takes_largest and all(one.after is one.before for one in item.stages(x))


def test_the_order_of_the_stages() -> None:
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


def test_processing_along_a_path_is_processing_step_by_step() -> None:
    item = sampler(SETTINGS[6], 12)
    x, path = torch.randn(3, 12, dtype=torch.float64), [5, 5]
    together = item.process(x, path)
    for i in range(3):
        torch.testing.assert_close(together[i : i + 1], item.after(path[:i]).process(x[i : i + 1]))


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, {"top_k": 3}, {"top_p": 0.8, "temperature": 1.5}, {"min_p": 0.3}])
def test_draws_follow_the_distribution(values: dict[str, Any]) -> None:
    """Chi-square over 1,500 seeds at one position, and over as many positions of one seed."""
    x = torch.tensor([[1.0, 0.2, -0.5, 0.7, -1.0]], dtype=torch.float64)
    by_seed = [sampler(values, 5, seed) for seed in range(1500)]
    moving = sampler(values, 5, 11)
    by_position = []
    for _ in range(1500):
        by_position.append(moving.fork())
        moving.position += 1
    expected = by_seed[0].process(x).softmax(-1)[0]
    possible = expected > 0
    for items in (by_seed, by_position):
        observed = torch.bincount(torch.tensor(choose_tokens(items, x.expand(1500, -1))), minlength=5)
        assert int(observed[~possible].sum()) == 0
        assert chisquare(observed[possible], 1500 * expected[possible]).pvalue > 1e-3


def test_chosen_and_top_logprobs_come_from_one_tensor() -> None:
    x = torch.randn(300)
    logprob, top = ranked(x, int(x.argmax()), 5)
    assert top[0] == (int(x.argmax()), logprob)
    assert [i for i, _ in top] == x.topk(5).indices.tolist()
    masked = torch.tensor([0.0, -math.inf, -math.inf])
    assert ranked(masked, 0, 3) == (0.0, ((0, 0.0),))
