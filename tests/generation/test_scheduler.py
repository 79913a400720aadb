"""The scheduler: who starts, and which tokens share a forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from mock_models import CountingModel, collect, counting_engine, greedy

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.model_runner import ModelRunner
from lit_gpt.generation.scheduler import Scheduler


class MockGeneration(SimpleNamespace):
    """A generation that needs `sequences` slots and waits for `forward_requests`."""

    def __init__(self, sequences: int = 1, forward_requests: list[ForwardRequest] | None = None) -> None:
        config = SimpleNamespace(sequences=sequences)
        super().__init__(generation_config=config, forward_requests=forward_requests or [], started=False, closed=False)

    def start(self) -> None:
        self.started = True

    def __eq__(self, other: object) -> bool:
        return self is other


def runner(n_slot: int = 6) -> ModelRunner:
    model = CountingModel(vocab_size=100)
    return ModelRunner(model, model.config, n_slot=n_slot, n_vocab=100)


def schedule(model_runner: ModelRunner, requests: list[ForwardRequest], chunk: int = 8) -> list[list[tuple[int, int]]]:
    """What is scheduled, each as (which request, number of tokens)."""
    scheduler: Any = Scheduler(model_runner.slots.n_slot, prefill_chunk=chunk)
    scheduler.running = [MockGeneration(forward_requests=[request]) for request in requests]
    found = scheduler.schedule(model_runner)
    assert found.known == []
    return [[(requests.index(request), request.num_scheduled) for request in batch] for batch in found.batches]


def request(model_runner: ModelRunner, computed: int, new: int, num_logits: int = 1, token: int = 0) -> ForwardRequest:
    """`new` tokens after `computed` ones; `token` tells sequences apart."""
    slots = model_runner.slots
    sequence = slots.open([token] * computed)
    slots.cache.lengths[sequence.slot] = computed
    slots.append(sequence, [token] * new)
    return ForwardRequest(sequence, [token] * new if computed else (), num_logits=num_logits)


def test_generations_start_in_their_order_while_their_slots_are_free() -> None:
    scheduler: Any = Scheduler(n_slot=4)
    first, wide, late = MockGeneration(2), MockGeneration(3), MockGeneration(1)
    for generation in (first, wide, late):
        scheduler.add(generation)
    scheduler.admit()
    assert (scheduler.running, list(scheduler.waiting)) == ([first], [wide, late])  # nobody overtakes
    assert first.started and not late.started
    first.closed = True
    scheduler.drop_closed()
    scheduler.admit()
    assert (scheduler.running, list(scheduler.waiting)) == ([wide, late], [])


def test_a_generation_is_removed_wherever_it_is() -> None:
    scheduler: Any = Scheduler(n_slot=1)
    running, waiting = MockGeneration(), MockGeneration()
    scheduler.add(running)
    scheduler.add(waiting)
    scheduler.admit()
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert not scheduler.running and not scheduler.waiting


def test_nothing_is_scheduled_where_nothing_is_asked_for() -> None:
    scheduler: Any = Scheduler(n_slot=2)
    scheduler.running = [MockGeneration()]
    assert scheduler.schedule(runner()) is None
    other = runner()
    scheduler.running = [MockGeneration(forward_requests=[request(other, 3, 1)])]
    assert scheduler.schedule(runner()) is None  # it is asked of another model
    assert scheduler.schedule(other) is not None


def test_single_tokens_and_verifications_share_a_pass_and_one_chunk_of_a_prompt_follows() -> None:
    model_runner = runner()
    requests = [
        request(model_runner, 5, 1, token=1),
        request(model_runner, 0, 30, token=2),
        request(model_runner, 9, 4, num_logits=4, token=3),
        request(model_runner, 7, 1, token=4),
    ]
    assert schedule(model_runner, requests) == [[(0, 1), (2, 4), (3, 1)], [(1, 8)]]


def test_prompts_share_a_chunk_within_its_budget_and_without_much_padding() -> None:
    model_runner = runner()
    requests = [request(model_runner, 0, n, token=n) for n in (4, 3, 7, 2)]
    assert schedule(model_runner, requests, chunk=8) == [[(0, 4), (1, 3)]]
    model_runner = runner()
    requests = [request(model_runner, 0, n, token=n) for n in (16, 2, 3, 15)]
    assert schedule(model_runner, requests, chunk=64) == [[(0, 16), (1, 2), (3, 15)]]


def test_tokens_whose_logits_are_wanted_stay_together() -> None:
    model_runner = runner()
    assert schedule(model_runner, [request(model_runner, 3, 20, num_logits=20)], chunk=8) == [[(0, 20)]]
    model_runner = runner()
    assert schedule(model_runner, [request(model_runner, 0, 10, num_logits=4)], chunk=8) == [[(0, 6)]]


def test_padding_must_fit_into_the_slots() -> None:
    model_runner = runner()
    capacity = model_runner.slots.capacity
    requests = [
        request(model_runner, capacity - 1, 1, token=1),
        request(model_runner, 9, 4, num_logits=4, token=2),
        request(model_runner, 8, 1, token=3),
    ]
    assert schedule(model_runner, requests) == [[(0, 1), (2, 1)], [(1, 4)]]


def test_running_requests_share_one_forward_a_step() -> None:
    model = CountingModel()
    engine = counting_engine(model)
    prompts = [[1], [2], [3], [4]]
    requests = [engine.submit(prompt, greedy(6)) for prompt in prompts]
    ids = collect(engine)
    assert [ids[request, 0] for request in requests] == [model.greedy(prompt, 6) for prompt in prompts]
    assert model.batches == [(4, 1)] * 6
