"""What `auto` chooses, and that what is timed is decided by the timing alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.train import precision
from lit_gpt.train.precision import Timing, resolve_compile, resolve_precision


def pretend(monkeypatch: pytest.MonkeyPatch, cuda: bool = False, native: bool = False, cpu_bf16: bool = False) -> None:
    def is_bf16_supported(including_emulation: bool = True) -> bool:
        return native or including_emulation  # as PyTorch answers on a V100

    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla X")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: cpu_bf16)


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"cuda": True, "native": True}, "bf16-mixed"),
        ({"cuda": True, "native": False}, "16-mixed"),
        ({"cpu_bf16": False}, "32-true"),
    ],
)
def test_hardware_that_settles_it_is_not_timed(
    machine: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend(monkeypatch, **machine)
    monkeypatch.setattr(precision, "probe", lambda *_: pytest.fail("timed"))
    decision = resolve_precision("auto", tiny_config, batch_size=2)
    assert (decision.precision, decision.timings) == (expected, ())


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(1.0, 0.3, "bf16-mixed"), (1.0, 0.99, "32-true"), (1.0, 10.0, "32-true")]
)
def test_the_faster_of_two_timings_is_taken(
    fp32: float, bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend(monkeypatch, cpu_bf16=True)
    timings = Timing("32-true", fp32, 64), Timing("bf16-mixed", bf16, 64)
    monkeypatch.setattr(precision, "probe", lambda *_: timings)
    decision = resolve_precision("auto", tiny_config, batch_size=2, accelerator="cpu")
    assert decision.precision == expected
    assert decision.to_dict()["seconds_per_step"] == {"32-true": fp32, "bf16-mixed": bf16}


def test_the_probe_runs_both_precisions_at_the_actual_shapes_and_leaves_no_trace(
    tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_PROBE_SECONDS", 0.0)
    seen: list[tuple[Any, ...]] = []
    original = precision.GPT.forward

    def forward(self: Any, idx: torch.Tensor, targets: torch.Tensor) -> Any:
        seen.append((torch.is_autocast_enabled("cpu"), tuple(idx.shape), self.training))
        return original(self, idx, targets)

    monkeypatch.setattr(precision.GPT, "forward", forward)
    state = torch.random.get_rng_state()
    timings = precision.probe(tiny_config, 3, 16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert seen == [(False, (3, 16), True), (True, (3, 16), True)]
    assert [timing.precision for timing in timings] == ["32-true", "bf16-mixed"]
    assert all(timing.seconds > 0 and timing.tokens == 48 for timing in timings)


def test_a_long_step_is_probed_on_fewer_rows(tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_PROBE_SECONDS", 0.0)
    monkeypatch.setattr(precision, "_PROBE_FLOPS", 2.5 * 3 * 16 * tiny_config.forward_flops_per_token(16))
    assert precision.probe(tiny_config, 8, 16)[0].tokens == 2 * 16


@pytest.mark.parametrize(("asked", "given"), [("bf16-true", "bf16-true"), ("32", "32-true"), ("bf16", "bf16-mixed")])
def test_an_explicit_precision_always_wins(
    asked: str, given: str, tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, cuda=True)
    assert resolve_precision(asked, tiny_config, 1).precision == given


def test_an_unknown_precision_is_refused_with_the_nearest(tiny_config: GPTConfig) -> None:
    with pytest.raises(UserError, match='did you mean "bf16-mixed"'):
        resolve_precision("bf16-mix", tiny_config, 1)


def test_hardware_table_says_what_auto_would_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cpu_bf16=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "timed" in dict(precision.hardware_table())["training auto"]
    pretend(monkeypatch, cuda=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    device = SimpleNamespace(name="Tesla X", total_memory=16 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    table = dict(precision.hardware_table())
    assert table["cuda:0"] == "Tesla X, 16 GiB"
    assert table["native bf16"] == "no"
    assert "16-mixed" in table["training auto"]


@pytest.mark.parametrize(("compiled", "expected"), [(0.5, True), (0.99, False), (2.0, False)])
def test_compiling_is_timed_where_the_run_is_long_and_taken_if_it_is_faster(
    compiled: float, expected: bool, monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(precision, "_cpu_compiler", lambda: True)
    asked = []

    def timed(config: GPTConfig, kind: str, rows: int, checkpointing: bool, compile: bool = False) -> Timing:
        asked.append(compile)
        return Timing(kind, compiled if compile else 1.0, rows * 32, rows)

    monkeypatch.setattr(precision, "_time_steps", timed)
    assert resolve_compile(tiny_config, "32-true", 2, 10**9)[0] is expected
    assert asked == [False, True]
    assert resolve_compile(tiny_config, "32-true", 2, 10**9, Timing("32-true", 1.0, 64, 2))[0] is expected
    assert asked == [False, True, True]


def test_a_short_run_is_not_compiled_and_not_timed(monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(precision, "_cpu_compiler", lambda: True)
    monkeypatch.setattr(precision, "_time_steps", lambda *_: pytest.fail("timed"))
    assert resolve_compile(tiny_config, "32-true", 2, 1000)[0] is False
    assert resolve_compile(tiny_config, "32-true", 2, 10**9, Timing("32-true", 1e-7, 64, 2))[0] is False


def test_without_a_compiler_nothing_is_compiled_and_on_a_gpu_everything(
    monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(precision, "_cpu_compiler", lambda: False)
    assert resolve_compile(tiny_config, "32-true", 2, 10**12)[0] is False
    pretend(monkeypatch, cuda=True, native=True)
    assert resolve_compile(tiny_config, "bf16-mixed", 2, 0)[0] is True


def test_steps_are_timed_with_and_without_compiling_and_leave_no_trace(tiny_config: GPTConfig) -> None:
    if not precision._cpu_compiler():
        pytest.skip("no compiler")
    state = torch.random.get_rng_state()
    for compile in (False, True):
        timing = precision._time_steps(tiny_config, "32-true", 2, False, compile)
        assert timing.seconds > 0
        assert (timing.tokens, timing.rows) == (2 * tiny_config.block_size, 2)
    assert torch.equal(torch.random.get_rng_state(), state)
