"""An exception of one generation ends it alone: the others go on, its slots are free again, the log says where."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Any

import pytest
import torch
from mock_models import CountingModel, counting_engine, greedy

from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation import Generation, Strategy, StrategySteps
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Output


def _raise_at_once(generation: Generation) -> StrategySteps:
    raise IndexError("secret")
    yield []


def _raise_later(generation: Generation) -> StrategySteps:
    request, _ = yield from generation.read_prompt()
    generation.fork(request.sequence)
    raise UserError("this cannot be continued: write another")


def _refuse_to_close(generation: Generation) -> StrategySteps:
    request, _ = yield from generation.read_prompt()
    while True:
        with suppress(GeneratorExit):
            (request,) = yield [ForwardRequest(request.sequence, [10**6])]


def _ask_for_an_id_that_there_is_not(generation: Generation) -> StrategySteps:
    request, _ = yield from generation.read_prompt()
    yield [ForwardRequest(request.sequence, [10**6])]


def _ask_for_a_freed_sequence(generation: Generation) -> StrategySteps:
    request, _ = yield from generation.read_prompt()
    generation.free(request.sequence)
    yield [ForwardRequest(request.sequence, [1])]


def _ask_for_no_logits(generation: Generation) -> StrategySteps:
    request, _ = yield from generation.read_prompt()
    yield [ForwardRequest(request.sequence, [1], num_logits=0)]


def _ask_twice(generation: Generation) -> StrategySteps:
    request, _ = yield from generation.read_prompt()
    yield [ForwardRequest(request.sequence, [1]), ForwardRequest(request.sequence, [2])]


def _ask_for_nothing_sensible(generation: Generation) -> Any:
    yield from generation.read_prompt()
    yield [None]


def _end_without_a_token(generation: Generation) -> StrategySteps:
    yield from generation.read_prompt()


BAD = [
    _end_without_a_token,
    _raise_at_once,
    _raise_later,
    _refuse_to_close,
    _ask_for_an_id_that_there_is_not,
    _ask_for_a_freed_sequence,
    _ask_for_no_logits,
    _ask_twice,
    _ask_for_nothing_sensible,
]


def _ends(engine: Engine) -> dict[int, tuple[list[int], Output]]:
    ids: dict[int, list[int]] = {}
    last: dict[int, Output] = {}
    for output in engine.drain():
        ids.setdefault(output.request, []).extend(token.id for token in output.tokens)
        last[output.request] = output
    return {request: (ids[request], last[request]) for request in ids}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the one that refuses to close
@pytest.mark.parametrize("strategy", BAD, ids=lambda strategy: strategy.__name__.strip("_"))
def test_a_strategy_that_fails_ends_its_own_request(strategy: Strategy, caplog: pytest.LogCaptureFixture) -> None:
    model = CountingModel()
    engine = counting_engine(model)
    before = engine.submit([1, 2], greedy(9))
    bad = engine.submit([3], greedy(9), strategy=strategy)
    after = engine.submit([2, 2], greedy(9))
    ends = _ends(engine)
    assert ends[before][0] == model.greedy([1, 2], 9) and ends[after][0] == model.greedy([2, 2], 9)
    assert ends[bad][1].finish_reason == "error" and ends[bad][1].error
    assert f"request {bad}, continuation 0 failed" in caplog.text
    assert "secret" not in (ends[bad][1].error or "")
    assert engine.slots.load == 0 and not engine.has_work
    assert all(not engine.slots.is_live(slot) for slot in range(engine.slots.n_slot))


def test_an_observer_and_a_value_that_fail_end_their_own_request() -> None:
    model = CountingModel()
    engine = counting_engine(model)

    def observe(sampler: Any, raw: Any, token: Any) -> None:
        if token.id == 10:
            raise KeyError(token.id)

    engine.observer = observe
    seen = {prompt: model.greedy([prompt], 6) for prompt in range(11)}
    bad = next(prompt for prompt, ids in seen.items() if 10 in ids)
    good = next(prompt for prompt, ids in seen.items() if 10 not in ids)
    requests = [engine.submit([bad], greedy(6)), engine.submit([good], greedy(6))]
    mcts = GenerationConfig(strategy="mcts", max_new_tokens=2, num_simulations=2, top_k=2)
    rated = engine.submit([good], mcts, value=lambda ids: 1 / 0)
    ends = _ends(engine)
    assert [ends[request][1].finish_reason for request in requests] == ["error", "length"]
    assert ends[requests[1]][0] == seen[good]
    assert ends[rated][1].error == "ZeroDivisionError at token 1 of continuation 0: the log says where it was raised"


def test_one_row_that_cannot_be_chosen_from_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    """All tokens of a step are chosen by one call; if it raises, each row is tried by itself."""
    caplog.set_level(logging.ERROR)
    model = CountingModel()
    engine = counting_engine(model)
    draw = GenerationConfig(max_new_tokens=5, top_k=3, seed=4)
    right = [output for output in _ends(_submitted(engine, [[2], [3]], draw)).values()]
    requests = [engine.submit([prompt], draw) for prompt in (2, 1, 3)]
    engine.scheduler.admit()
    engine.scheduler.running[1].sampler._bias = torch.zeros(99)  # of a width that no logits have
    ends = _ends(engine)
    assert ends[requests[1]][1].finish_reason == "error"
    assert [ends[requests[0]][0], ends[requests[2]][0]] == [ids for ids, _ in right]


def _submitted(engine: Engine, prompts: list[list[int]], settings: GenerationConfig) -> Engine:
    for prompt in prompts:
        engine.submit(prompt, settings)
    return engine


def test_a_submit_that_fails_half_way_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = counting_engine(CountingModel())
    original = Engine._sampler

    def failing(self: Engine, request: Any, seed: int) -> Any:
        if seed == 6:
            raise RuntimeError("no memory")
        return original(self, request, seed)

    monkeypatch.setattr(Engine, "_sampler", failing)
    with pytest.raises(RuntimeError):
        engine.submit([1], GenerationConfig(num_samples=3, seed=5))
    assert not engine.has_work
