"""Prefixes that another sequence has computed: copied, waited for, and never computed twice."""

from __future__ import annotations

import torch
from mock_models import CountingModel, collect, counting_engine, greedy

from lit_gpt.generation.forward_request import ForwardRequest
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.generation.prefix_cache import PrefixCache
from lit_gpt.generation.slots import CachedSequence, PromptResult, SlotManager
from lit_gpt.model.config import GPTConfig

PROMPT = list(range(100, 140))


def manager(n_slot: int = 4) -> SlotManager:
    return SlotManager(GPTConfig(200, block_size=64, n_layer=1, n_head=1, n_embd=1, head_dim=1), n_slot)


def compute(slots: SlotManager, sequence: CachedSequence, n: int | None = None) -> None:
    """As a forward pass would: the keys are the ids."""
    first = slots.computed(sequence)
    n = slots.pending(sequence) if n is None else n
    slots.cache.k[0, sequence.slot, 0, first : first + n, 0] = torch.tensor(sequence.ids[first : first + n]).float()
    slots.cache.extend([sequence.slot], n)


def keys(slots: SlotManager, sequence: CachedSequence) -> list[int]:
    return slots.cache.k[0, sequence.slot, 0, : slots.computed(sequence), 0].int().tolist()


def test_a_common_prefix_is_fed_once() -> None:
    model = CountingModel(vocab_size=50)
    engine = counting_engine(model, prefill_chunk=8)
    shared = list(range(20))
    prompts = [[*shared, 30], [*shared, 31], [*shared, 32]]
    requests = [engine.submit(prompt, greedy(1)) for prompt in prompts]
    ids = collect(engine)
    assert [ids[request, 0] for request in requests] == [model.greedy(prompt, 1) for prompt in prompts]
    assert engine.model_runner.fed == 20 + 3  # the prefix once, each last token
    late = engine.submit([*shared, 33, 34], greedy(1))
    assert collect(engine)[late, 0] == model.greedy([*shared, 33, 34], 1)
    assert engine.model_runner.fed == 20 + 3 + 2  # freed sequences are remembered


def test_samples_of_one_prompt_read_it_once() -> None:
    model = CountingModel()
    engine = counting_engine(model)
    engine.submit([1, 2, 3, 4, 5], GenerationConfig(max_new_tokens=1, num_samples=4, seed=1))
    collect(engine)
    assert engine.model_runner.fed == 5


def test_the_longest_computed_prefix_is_copied_and_the_last_token_is_left() -> None:
    slots = manager()
    short, long = slots.open(PROMPT[:10]), slots.open(PROMPT[:30])
    compute(slots, short)
    compute(slots, long)
    request = ForwardRequest(slots.open(PROMPT[:20]))
    assert PrefixCache(slots).reuse([request]) == ([], [request])
    assert keys(slots, request.sequence) == PROMPT[:19]
    assert (slots.pending(request.sequence), slots.reused) == (1, 19)


def test_a_prompt_waits_for_a_prefix_that_is_being_computed() -> None:
    slots = manager()
    cache = PrefixCache(slots)
    first, second = ForwardRequest(slots.open(PROMPT)), ForwardRequest(slots.open([*PROMPT, 7]))
    assert cache.reuse([first, second]) == ([], [first])
    compute(slots, first.sequence, 20)
    assert cache.reuse([first, second]) == ([], [first])
    compute(slots, first.sequence)
    assert cache.reuse([second]) == ([], [second])
    assert keys(slots, second.sequence) == PROMPT


def test_a_prompt_does_not_wait_for_a_prefix_that_saves_little() -> None:
    slots = manager()
    requests = [ForwardRequest(slots.open(PROMPT)), ForwardRequest(slots.open([*PROMPT[:10], *range(30)]))]
    assert PrefixCache(slots).reuse(requests) == ([], requests)


def test_nothing_is_reused_where_every_logit_is_wanted() -> None:
    slots = manager()
    compute(slots, slots.open(PROMPT))
    request = ForwardRequest(slots.open(PROMPT[:20], reuse=False))
    PrefixCache(slots).reuse([request])
    assert (slots.pending(request.sequence), slots.reused) == (20, 0)


def test_the_same_prompt_is_done_at_once_with_the_same_logits() -> None:
    slots = manager()
    first = slots.open(PROMPT)
    compute(slots, first)
    first.end_of_prompt = PromptResult(len(PROMPT), torch.tensor([1.0, 2.0]), None)
    request, with_states = ForwardRequest(slots.open(PROMPT)), ForwardRequest(slots.open(PROMPT), hidden=True)
    assert PrefixCache(slots).reuse([request, with_states]) == ([request], [with_states])
    assert request.done and request.logits.tolist() == [[1.0, 2.0]]
    assert slots.pending(with_states.sequence) == 1  # its states are not known: the last token is computed again
    assert slots.reused == 2 * len(PROMPT) - 1
