"""Timing of a training step: at the run's own shapes, with the random state left alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch._inductor.config

from lit_gpt.model.config import GPTConfig
from lit_gpt.train import step_timing
from lit_gpt.train.compile import has_cpu_compiler


def test_both_precisions_are_timed_at_the_actual_shapes_without_touching_the_random_state(
    tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_timing, "_PROBE_SECONDS", 0.0)
    seen: list[tuple[Any, ...]] = []
    original = step_timing.GPT.forward

    def forward(self: Any, idx: torch.Tensor, targets: torch.Tensor) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), tuple(idx.shape), self.training))
        return original(self, idx, targets)

    monkeypatch.setattr(step_timing.GPT, "forward", forward)
    state = torch.random.get_rng_state()
    timings = step_timing.time_precisions(tiny_config, 3, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seen == [(False, (3, 16), True), (True, (3, 16), True)]
    assert [timing.precision for timing in timings] == ["32-true", "bf16-mixed"]
    assert all(timing.seconds > 0 and timing.tokens == 48 for timing in timings)


def test_a_long_step_is_timed_on_fewer_rows(tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_timing, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(step_timing, "_PROBE_FLOPS", 2.5 * 3 * 16 * tiny_config.forward_flops_per_token(16))
    assert step_timing.time_precisions(tiny_config, 8, 16)[0].tokens == 2 * 16


@pytest.mark.slow
def test_steps_are_timed_with_and_without_compiling_without_touching_the_random_state(
    tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not has_cpu_compiler():
        pytest.skip("no compiler")
    config = dataclasses.replace(tiny_config, n_layer=1)  # each block is compiled by itself
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)  # not a pool of processes that import PyTorch
    state = torch.random.get_rng_state()
    for compile in (False, True):
        timing = step_timing.time_steps(config, "32-true", 2, False, compile)
        assert timing.seconds > 0
        assert (timing.tokens, timing.rows) == (2 * config.block_size, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
