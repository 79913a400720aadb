"""Replayed traces beside those that were recorded while the tokens were chosen."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch
from models import tiny_gpt

from lit_gpt.errors import UserError
from lit_gpt.generation.complete import complete
from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.replay import replay_steps
from lit_gpt.generation.trace import Step, Tracer
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import get_tokenizer

TOKENIZER = get_tokenizer("byte")
PROMPT = TOKENIZER.encode("农夫山泉")
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 1.3, "banned_tokens": [65]},
    {"temperature": 1.4, "frequency_penalty": 0.5, "presence_penalty": 0.2, "min_new_tokens": 90},
    {"temperature": 0},
    {"stop_token_ids": list(range(40)), "min_new_tokens": 5},
]


@pytest.fixture(scope="module")
def model() -> GPT:
    return tiny_gpt(block_size=256)


def recorded(model: GPT, settings: GenerationConfig) -> tuple[list[int], list[Step]]:
    """The ids of a continuation, and how each was chosen, as an observer saw it."""
    engine = Engine(model, model.config, TOKENIZER, max_slots=1)
    engine.observer = tracer = Tracer(TOKENIZER)
    ((_, completions),) = complete(engine, [PROMPT], settings)
    return completions[0].ids, tracer.drain(completions)[0]


def numbers(step: Step) -> dict[str, Any]:
    """A step with its numbers to 9 digits: one pass over many tokens adds them up in another order."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 9)
        if isinstance(value, dict):
            return {key: rounded(each) for key, each in value.items()}
        return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value

    return rounded(asdict(step))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_replay_shows_what_an_observer_saw(model: GPT, settings: dict[str, Any]) -> None:
    generation_config = GenerationConfig(max_new_tokens=150, seed=3, overflow="stop", **settings)
    ids, steps = recorded(model, generation_config)
    assert ids
    engine = Engine(model, model.config, TOKENIZER, max_slots=1)
    replayed = replay_steps(engine, PROMPT, ids, generation_config)
    assert list(map(numbers, replayed)) == list(map(numbers, steps))
    assert engine.observer is None and not engine.has_work
    assert engine.model_runner.forwards <= 2 + len(ids) // 64  # and not one for each token


@pytest.mark.slow
def test_a_continuation_that_was_stopped_is_replayed_as_far_as_it_came(model: GPT) -> None:
    generation_config = GenerationConfig(max_new_tokens=150, seed=3, overflow="stop", min_new_tokens=100)
    ids, steps = recorded(model, generation_config)
    engine = Engine(model, model.config, TOKENIZER, max_slots=1)
    for n in (0, 1, 64, 65, 70):
        replayed = replay_steps(engine, PROMPT, ids[:n], generation_config)
        assert list(map(numbers, replayed)) == list(map(numbers, steps[:n]))


def test_a_replay_that_fails_leaves_the_engine_as_it_was(model: GPT) -> None:
    engine = Engine(model, model.config, TOKENIZER, max_slots=1)
    with pytest.raises(UserError, match="outside the vocabulary"):
        replay_steps(engine, [10**6], [1, 2], GenerationConfig())
    with pytest.raises(RuntimeError):
        replay_steps(engine, PROMPT, [1, 10**6, 2], GenerationConfig())
    assert engine.observer is None and not engine.has_work
    with torch.inference_mode():
        assert len(replay_steps(engine, PROMPT, [1, 2], GenerationConfig(seed=1))) == 2
