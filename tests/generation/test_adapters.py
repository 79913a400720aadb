"""Requests for adapters: each pass is told which row has which, and no prefix of another adapter is reused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from mock_models import CountingModel, collect, counting_engine, greedy

from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Draft
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.slots import SlotManager
from lit_gpt.model.config import GPTConfig

PROMPT = list(range(40, 60))


class Recorded:
    """Adapters that do nothing."""

    count = 2

    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def select(self, rows: Sequence[int]) -> None:
        self.rows.append(list(rows))


def test_each_pass_is_told_the_adapters_of_its_rows() -> None:
    adapters = Recorded()
    engine = counting_engine(CountingModel(), adapters=adapters)
    for number in (2, 0, 1):
        engine.submit([1 + number], greedy(3), adapter=number)
    collect(engine)
    assert [sorted(rows) for rows in adapters.rows] == [[0, 1, 2]] * 3


def test_a_prefix_is_reused_under_its_own_adapter_only() -> None:
    engine = counting_engine(CountingModel(vocab_size=70), adapters=Recorded())
    for number, fed in [(1, 20), (2, 40), (1, 40), (0, 60), (2, 60), (0, 60)]:
        engine.submit(PROMPT, greedy(1), adapter=number)
        collect(engine)
        assert engine.model_runner.fed == fed, number


def test_nobody_waits_for_a_prefix_of_another_adapter() -> None:
    engine = counting_engine(CountingModel(vocab_size=70), adapters=Recorded())
    for number in (1, 2, 1):
        engine.submit(PROMPT, greedy(1), adapter=number)
    engine.step()
    assert engine.model_runner.fed == 40  # the third waits for the first, the second for nobody
    collect(engine)
    assert engine.model_runner.fed == 40


def test_a_slot_that_is_taken_over_keeps_nothing_of_another_adapter() -> None:
    slots = SlotManager(GPTConfig(200, block_size=64, n_layer=1, n_head=1, n_embd=1, head_dim=1), 1)
    first = slots.open(PROMPT, adapter=1)
    slots.cache.extend([first.slot], len(PROMPT))
    slots.free(first)
    assert slots.pending(slots.open([*PROMPT, 1], adapter=2)) == 21


def test_forks_have_the_adapter_of_what_they_are_forked_from() -> None:
    adapters = Recorded()
    engine = counting_engine(CountingModel(), adapters=adapters)
    engine.submit([1, 2], GenerationConfig(strategy="beam", num_beams=3, max_new_tokens=4), adapter=2)
    collect(engine)
    assert {number for rows in adapters.rows for number in rows} == {2}


def test_a_draft_has_no_adapters() -> None:
    model, adapters = CountingModel(), Recorded()
    draft: Any = Draft(CountingModel(), model.config)
    engine = counting_engine(model, adapters=adapters, draft=draft)
    settings = GenerationConfig(strategy="speculative", draft="draft.ckpt", max_new_tokens=6, temperature=0.0)
    engine.submit([1, 2], settings, adapter=1)
    (ids,) = collect(engine).values()
    assert ids == model.greedy([1, 2], 6)
    assert {number for rows in adapters.rows for number in rows} == {1}


@pytest.mark.parametrize("number", [-1, 3])
def test_an_adapter_that_is_not_there(number: int) -> None:
    engine = counting_engine(CountingModel(), adapters=Recorded())
    with pytest.raises(UserError, match=f"the model has no adapter {number}"):
        engine.submit([1], greedy(1), adapter=number)
    with pytest.raises(UserError, match="the model has no adapter 1"):
        counting_engine(CountingModel()).submit([1], greedy(1), adapter=1)
