"""Whatever is submitted, stepped and cancelled, in whatever order: each greedy text is its own uncached run."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
from models import tiny_gpt

from lit_gpt.generation.engine import Engine
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.gpt import GPT

BLOCK, V = 12, 13


@lru_cache
def random_gpt(position: Any) -> GPT:
    """One whose likeliest token changes from step to step: a bias, or the last token's own row, would fix it."""
    kv_head = 1 if position == "rope" else None
    shape = {"vocab_size": V, "block_size": BLOCK, "n_head": 2, "n_kv_head": kv_head, "n_embd": 16}
    model = tiny_gpt(std=0.6, tie_embeddings=False, position=position, **shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    return model


@cache
def next_token(position: str, text: tuple[int, ...]) -> int:
    with torch.no_grad():
        return int(random_gpt(position)(torch.tensor([text[-BLOCK:]])).logits[0, -1].argmax())


# Few different tokens, so that prompts often begin alike and rows are copied.
PROMPTS = st.one_of(
    st.lists(st.integers(0, 1), min_size=1, max_size=2 * BLOCK),
    st.lists(st.integers(0, V - 1), min_size=1, max_size=8).map(lambda tail: [3, 1, 4, 1, 5, 9, *tail]),
)
STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "greedy"},
    {"strategy": "speculative", "temperature": 0, "num_draft_tokens": 3},
    {"strategy": "contrastive", "penalty_alpha": 0, "top_k": 2},
    {"strategy": "beam", "num_beams": 1},
]


class EngineMachine(RuleBasedStateMachine):
    requests = Bundle("requests")

    @initialize(
        position=st.sampled_from(["learned", "sinusoidal", "rope"]),
        max_slots=st.integers(2, 5),
        prefill_chunk=st.integers(1, 9),
    )
    def begin(self, position: str, max_slots: int, prefill_chunk: int) -> None:
        model = random_gpt(position)
        self.position = position
        self.engine = Engine(model, model.config, max_slots=max_slots, prefill_chunk=prefill_chunk)
        self.asked: dict[int, tuple[list[int], int]] = {}
        self.ids: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}

    @rule(target=requests, prompt=PROMPTS, n=st.integers(1, 2 * BLOCK), values=st.sampled_from(STRATEGIES))
    def submit(self, prompt: list[int], n: int, values: dict[str, Any]) -> int:
        request = self.engine.submit(prompt, GenerationConfig(max_new_tokens=n, **values))
        self.asked[request], self.ids[request] = (prompt, n), []
        return request

    @rule(n=st.integers(1, 10))
    def step(self, n: int) -> None:
        for _ in range(n):
            for output in self.engine.step():
                assert output.request not in self.reasons, "an output of a continuation that had ended"
                self.ids[output.request] += [token.id for token in output.tokens]
                if output.finish_reason is not None:
                    self.reasons[output.request] = output.finish_reason

    @rule(request=consumes(requests))
    def cancel(self, request: int) -> None:
        self.engine.cancel(request)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        while self.engine.has_work:
            self.step(1)
        assert self.reasons.keys() == self.asked.keys()
        assert not any(self.engine.slots.is_live(slot) for slot in range(self.engine.slots.n_slot)), "a slot was lost"
        for request, (prompt, n) in self.asked.items():
            text = list(prompt)
            for _ in self.ids[request]:
                text.append(next_token(self.position, tuple(text[-BLOCK:])))
            assert self.ids[request] == text[len(prompt) :]
            assert self.reasons[request] == "cancelled" or len(self.ids[request]) == n


TestEngine = pytest.mark.slow(EngineMachine.TestCase)
TestEngine.settings = settings(max_examples=12, stateful_step_count=16, deadline=None)
