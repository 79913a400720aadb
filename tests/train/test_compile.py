"""When `compile: auto` compiles: on a GPU, and on a CPU where it was timed to be faster."""

from __future__ import annotations

import pytest
from machine import pretend_machine

from lit_gpt.model.config import GPTConfig
from lit_gpt.train import compile as compile_module
from lit_gpt.train.compile import resolve_compile
from lit_gpt.train.step_timing import StepTiming


@pytest.mark.parametrize(("compiled", "expected"), [(0.5, True), (0.99, False), (2.0, False)])
def test_compiling_is_timed_where_the_run_is_long_and_done_if_it_is_faster(
    compiled: float, expected: bool, monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend_machine(monkeypatch)
    monkeypatch.setattr(compile_module, "has_cpu_compiler", lambda: True)
    asked = []

    def timed(config: GPTConfig, kind: str, rows: int, checkpointing: bool, compile: bool = False) -> StepTiming:
        asked.append(compile)
        return StepTiming(kind, compiled if compile else 1.0, rows * 32, rows)

    monkeypatch.setattr(compile_module, "time_steps", timed)
    assert resolve_compile(tiny_config, "32-true", 2, 10**9)[0] is expected
    assert asked == [False, True]
    assert resolve_compile(tiny_config, "32-true", 2, 10**9, StepTiming("32-true", 1.0, 64, 2))[0] is expected
    assert asked == [False, True, True]


def test_a_short_run_is_not_compiled_and_not_timed(monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig) -> None:
    pretend_machine(monkeypatch)
    monkeypatch.setattr(compile_module, "has_cpu_compiler", lambda: True)
    monkeypatch.setattr(compile_module, "time_steps", lambda *_: pytest.fail("timed"))
    assert resolve_compile(tiny_config, "32-true", 2, 1000)[0] is False
    assert resolve_compile(tiny_config, "32-true", 2, 10**9, StepTiming("32-true", 1e-7, 64, 2))[0] is False
    slow = StepTiming("32-true", 9.0, 64, 2)  # of many steps such a machine makes a few within its budget
    assert resolve_compile(tiny_config, "32-true", 2, 10**12, slow, max_seconds=165.0)[0] is False


def test_without_a_compiler_nothing_is_compiled_and_on_a_gpu_everything(
    monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend_machine(monkeypatch)
    monkeypatch.setattr(compile_module, "has_cpu_compiler", lambda: False)
    assert resolve_compile(tiny_config, "32-true", 2, 10**12)[0] is False
    pretend_machine(monkeypatch, cuda=True, native=True)
    assert resolve_compile(tiny_config, "bf16-mixed", 2, 0)[0] is True
