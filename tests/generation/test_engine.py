"""The engine against the loop without a cache, against a model that counts, and with other requests beside."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from mock_models import CountingModel, collect, counting_engine, greedy
from models import tiny_gpt

from lit_gpt.errors import UserError
from lit_gpt.generation.engine import Draft, Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.outputs import Output
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer, get_tokenizer

POSITIONS: list[dict[str, Any]] = [
    {"position": "learned"},
    {"position": "sinusoidal"},
    {"position": "rope", "n_kv_head": 2, "norm": "rmsnorm", "mlp": "swiglu", "qk_norm": True},
]
BLOCK = 24


random_gpt = partial(tiny_gpt, vocab_size=61, block_size=BLOCK)


@torch.no_grad()
def changing_gpt(**shape: Any) -> GPT:
    """A model whose likeliest token changes from step to step: a bias, or the last token's own row, would fix it."""
    model = random_gpt(seed=1, std=0.6, tie_embeddings=False, **shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
    return model


@torch.no_grad()
def uncached_greedy(model: GPT, prompt: Sequence[int], n: int) -> list[int]:
    """nanoGPT's loop: crop, forward, take the last."""
    ids = list(prompt)
    for _ in range(n):
        cropped = torch.tensor([ids[-model.config.block_size :]])
        ids.append(int(model(cropped).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def finals(engine: Engine) -> dict[int, Output]:
    return {output.request: output for output in engine.drain() if output.finish_reason}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", POSITIONS, ids=lambda values: values["position"])
def test_greedy_equals_the_uncached_loop_past_the_context(overrides: dict[str, Any]) -> None:
    model = changing_gpt(**overrides)
    engine = Engine(model, model.config, max_slots=4, prefill_chunk=5)
    asked = [  # prompts, and how much is written: of all but the last one beyond the context
        ([1, 2, 3], BLOCK + 4),
        ([5] * 40, 6),
        ([7, 7, 7, 9, 11, 4], BLOCK),
        ([1, 2, 3, 4, 5, 6, 7, 8], BLOCK - 4),
        ([60], BLOCK + 2),
        ([1, 2, 3, 4], 4),
    ]
    requests = [engine.submit(prompt, greedy(n)) for prompt, n in asked]
    ids = collect(engine)
    for request, (prompt, n) in zip(requests, asked):
        assert ids[request, 0] == uncached_greedy(model, prompt, n)
    assert len(set(ids[requests[0], 0])) > 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"top_k": 7},
        {"top_p": 0.7},
        {"min_p": 0.1, "temperature": 1.7},
        {"top_k": 20, "top_p": 0.9, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
    ],
)
def test_a_seed_gives_the_same_text_alone_and_in_company(settings: dict[str, Any]) -> None:
    model = random_gpt()
    generation_config = GenerationConfig(max_new_tokens=16, seed=5, num_samples=2, **settings)
    alone = Engine(model, model.config)
    request = alone.submit([3, 1, 4], generation_config)
    expected = {index: ids for (_, index), ids in collect(alone).items()}
    assert expected[0] != expected[1]

    company = Engine(model, model.config, max_slots=5, prefill_chunk=4)
    others = [GenerationConfig(max_new_tokens=8, seed=i, top_k=9 if i % 2 else None) for i in range(4)]
    for other in others:
        company.submit([9, 9, other.seed or 0], other)
    for _ in range(3):
        company.step()
    request = company.submit([3, 1, 4], generation_config)
    company.submit([3, 1, 4, 1, 5], others[0])
    ids = collect(company)
    assert {index: ids[request, index] for index in range(2)} == expected


def test_sample_i_of_n_uses_seed_plus_i() -> None:
    model = random_gpt()
    engine = Engine(model, model.config)
    many = engine.submit([3, 1, 4], GenerationConfig(max_new_tokens=10, seed=5, num_samples=3))
    one = engine.submit([3, 1, 4], GenerationConfig(max_new_tokens=10, seed=7))
    ids = collect(engine)
    assert ids[many, 2] == ids[one, 0]


def test_logits_that_are_no_numbers_stop_one_request_only() -> None:
    model = CountingModel(broken=10)
    engine = counting_engine(model)
    victim = engine.submit([1, 10], greedy(6))
    prompt = [2, 2]
    assert 10 not in [*prompt, *model.greedy(prompt, 5)]
    other = engine.submit(prompt, greedy(6))
    outputs = list(engine.drain())
    last = {output.request: output for output in outputs if output.finish_reason}
    assert last[victim].finish_reason == "error"
    assert "token 1 of continuation 0" in (last[victim].error or "")
    assert last[other].finish_reason == "length"
    again = engine.submit(prompt, greedy(6))
    assert collect(engine)[again, 0] == model.greedy(prompt, 6)


def test_a_nan_in_the_cache_does_not_outlive_its_request() -> None:
    model = random_gpt()
    engine = Engine(model, model.config, max_slots=2)
    victim, other = engine.submit([3, 4], greedy(20)), engine.submit([5, 6], greedy(20))
    engine.step()
    engine.slots.cache.v[:, 0] = math.nan
    last = finals(engine)
    assert (last[victim].finish_reason, last[other].finish_reason) == ("error", "length")
    prompts = [[11], [8, 9, 10]]  # the shorter one is in the wiped slot, and padded
    requests = [engine.submit(prompt, greedy(20)) for prompt in prompts]
    ids = collect(engine)
    assert [ids[request, 0] for request in requests] == [uncached_greedy(model, prompt, 20) for prompt in prompts]


def test_a_cancelled_request_frees_its_slot_and_says_so() -> None:
    model = CountingModel()
    engine = Engine(model, model.config, dtype=torch.float64, max_slots=1)
    first, second = engine.submit([1], greedy(60)), engine.submit([2], greedy(3))
    engine.step()
    assert (engine.n_running, engine.n_waiting) == (1, 1)
    engine.cancel(first)
    last = finals(engine)
    assert last[first].finish_reason == "cancelled"
    assert last[second].finish_reason == "length"
    engine.cancel(second)  # over already: nothing happens
    assert not engine.has_work


def test_overflow_stop_ends_at_the_context() -> None:
    model = random_gpt()
    engine = Engine(model, model.config)
    request = engine.submit([1, 2, 3], greedy(100, overflow="stop"))
    assert collect(engine)[request, 0] == uncached_greedy(model, [1, 2, 3], BLOCK - 3)


@pytest.fixture
def byte_tokenizer() -> Tokenizer:
    return get_tokenizer("byte")


def test_bad_requests_are_refused_before_work_starts(byte_tokenizer: Tokenizer) -> None:
    model = random_gpt(vocab_size=257)
    engine = Engine(model, model.config, byte_tokenizer, max_slots=2)
    for prompt, generation_config, message in [
        ([1, 257], greedy(), "the prompt has token id 257, outside the vocabulary of 257"),
        ([-1], greedy(), "token id -1"),
        ([1] * 25, greedy(overflow="stop"), "25 tokens, the model's context is 24"),
        ([1], greedy(banned_tokens=[999]), "banned_tokens has token id 999"),
        ([1], GenerationConfig(strategy="beam", num_beams=3), "beam needs 3 slots of cache and there are 2"),
        ([1], GenerationConfig(strategy="speculative", draft="x.ckpt"), "the draft x.ckpt was not loaded"),
        ([1], greedy(stop=[""]), "stop has an empty string"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.submit(prompt, generation_config)
    assert not engine.has_work
    without = Engine(model, model.config)
    with pytest.raises(UserError, match="no end-of-text to start from"):
        without.submit([], greedy())
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        without.submit([1], greedy(stop="x"))
    engine.submit([], greedy())  # starts from end-of-text
    other = Tokenizer.build("other", r"(?s:.)", {**byte_tokenizer.ranks}, {"<|end|>": 256})
    with pytest.raises(UserError, match="use a draft with the same tokenizer"):
        Engine(model, model.config, byte_tokenizer, draft=Draft(model, model.config, other))


@pytest.mark.parametrize("settings", [{"banned_tokens": list(range(61))}, {"repetition_penalty": 1e-320}])
def test_settings_that_leave_no_token_end_that_request_only(settings: dict[str, Any]) -> None:
    model = random_gpt()
    engine = Engine(model, model.config, max_slots=3)
    good = engine.submit([1, 2, 3], GenerationConfig(strategy="greedy", max_new_tokens=6))
    bad = engine.submit([1, 2, 3], GenerationConfig(max_new_tokens=6, top_k=5, **settings))
    ids, ends = {}, {}
    for output in engine.drain():
        ids.setdefault(output.request, []).extend(token.id for token in output.tokens)
        ends[output.request] = output.finish_reason
    assert ends == {good: "length", bad: "error"}
    assert ids[good] == uncached_greedy(model, [1, 2, 3], 6)
