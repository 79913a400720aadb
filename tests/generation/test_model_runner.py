"""The forward pass: every request gets the logits and states of its own tokens, whatever shares the pass."""

from __future__ import annotations

from typing import Any

import torch
from mock_models import CountingModel

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.model_runner import ModelRunner
from lit_gpt.model.output import GPTOutput


def runner(model: Any = None, **values: Any) -> ModelRunner:
    model = model or CountingModel()
    values = {"n_slot": 4, "n_vocab": 11, "dtype": torch.float64, **values}
    return ModelRunner(model, model.config, **values)


def request(model_runner: ModelRunner, ids: list[int], n: int | None = None, **values: Any) -> ForwardRequest:
    made = ForwardRequest(model_runner.slots.open(ids), **values)
    made.num_scheduled = len(ids) if n is None else n
    return made


def test_requests_of_different_lengths_share_a_pass() -> None:
    model = CountingModel()
    model_runner = runner(model)
    prompts = [[1, 2, 3], [4], [5, 6]]
    requests = [request(model_runner, ids) for ids in prompts]
    assert model_runner.run(list(reversed(requests))) == requests  # in the order of the slots
    assert [int(one.logits[-1].argmax()) for one in requests] == [model.next(ids) for ids in prompts]
    assert [one.logits.shape for one in requests] == [(1, 11)] * 3
    assert (model.batches, model_runner.forwards, model_runner.fed) == ([(3, 3)], 1, 6)


def test_a_part_of_a_prompt_is_not_done() -> None:
    model = CountingModel()
    model_runner = runner(model)
    long, short = request(model_runner, [1, 2, 3, 4], n=2), request(model_runner, [5, 6])
    assert model_runner.run([long, short]) == [short]
    assert model_runner.slots.pending(long.sequence) == 2 and not long.done
    assert model_runner.run([long]) == [long]
    assert int(long.logits[-1].argmax()) == model.next([1, 2, 3, 4])


def test_all_logits_and_states_that_are_asked_for() -> None:
    model = CountingModel()
    model_runner = runner(model)
    many, one = request(model_runner, [1, 2, 3], num_logits=2, hidden=True), request(model_runner, [7])
    model_runner.run([many, one])
    assert many.logits.argmax(-1).tolist() == [model.next([1, 2]), model.next([1, 2, 3])]
    assert many.states.argmax(-1).tolist() == [2, 3]
    assert int(one.logits[-1].argmax()) == model.next([7]) and not len(one.states)


def test_the_result_of_a_prompt_is_kept_for_others() -> None:
    model_runner = runner()
    prompt, scored = request(model_runner, [1, 2]), request(model_runner, [3, 4])
    scored.sequence.reuse = False
    model_runner.run([prompt, scored])
    end = prompt.sequence.end_of_prompt
    assert end is not None and end.n_tokens == 2 and end.logits.equal(prompt.logits[-1])
    assert scored.sequence.end_of_prompt is None


def test_logits_are_cut_to_the_vocabulary_and_in_single_precision_at_least() -> None:
    class Low(CountingModel):
        def __call__(self, *args: Any, **values: Any) -> GPTOutput:
            output = super().__call__(*args, **values)
            return output._replace(logits=output.logits.bfloat16())

    model_runner = runner(Low(), n_vocab=9)
    one = request(model_runner, [1, 2])
    model_runner.run([one])
    assert (one.logits.shape, one.logits.dtype) == ((1, 9), torch.float32)
