"""What `precision: auto` chooses, and that what is timed is decided by the timing alone."""

from __future__ import annotations

import pytest
import torch
from machine import pretend_machine

from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.train import precision
from lit_gpt.train.precision import muon_arithmetic, resolve_precision
from lit_gpt.train.step_timing import StepTiming


@pytest.mark.parametrize(
    ("machine", "expected"),
    [
        ({"cuda": True, "native": True}, "bf16-mixed"),
        ({"cuda": True, "native": False}, "16-mixed"),
        ({"cpu_bf16": False}, "32-true"),
    ],
)
def test_hardware_that_leaves_no_choice_is_not_timed(
    machine: dict[str, bool], expected: str, monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend_machine(monkeypatch, **machine)
    monkeypatch.setattr(precision, "time_precisions", lambda *_: pytest.fail("timed"))
    decision = resolve_precision("auto", tiny_config, batch_size=2)
    assert (decision.precision, decision.timings) == (expected, ())


@pytest.mark.parametrize(
    ("fp32", "bf16", "expected"), [(1.0, 0.3, "bf16-mixed"), (1.0, 0.99, "32-true"), (1.0, 10.0, "32-true")]
)
def test_the_faster_of_two_timings_is_chosen(
    fp32: float, bf16: float, expected: str, monkeypatch: pytest.MonkeyPatch, tiny_config: GPTConfig
) -> None:
    pretend_machine(monkeypatch, cpu_bf16=True)
    timings = StepTiming("32-true", fp32, 64), StepTiming("bf16-mixed", bf16, 64)
    monkeypatch.setattr(precision, "time_precisions", lambda *_: timings)
    decision = resolve_precision("auto", tiny_config, batch_size=2, accelerator="cpu")
    assert decision.precision == expected
    assert decision.to_dict()["seconds_per_step"] == {"32-true": fp32, "bf16-mixed": bf16}


@pytest.mark.parametrize(("asked", "given"), [("bf16-true", "bf16-true"), ("32", "32-true"), ("bf16", "bf16-mixed")])
def test_an_explicit_precision_always_wins(
    asked: str, given: str, tiny_config: GPTConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_machine(monkeypatch, cuda=True)
    assert resolve_precision(asked, tiny_config, 1).precision == given


def test_an_unknown_precision_is_refused_with_the_nearest(tiny_config: GPTConfig) -> None:
    with pytest.raises(UserError, match='did you mean "bf16-mixed"'):
        resolve_precision("bf16-mix", tiny_config, 1)


@pytest.mark.parametrize(
    ("device", "machine", "dtype"),
    [
        ("cpu", {}, torch.float32),
        ("cpu", {"cpu_bf16": True}, torch.bfloat16),
        ("cuda", {"cuda": True}, torch.float32),  # a V100 would emulate it
        ("cuda", {"cuda": True, "native": True}, torch.bfloat16),
        ("mps", {"cpu_bf16": True}, torch.float32),
    ],
)
def test_muon_computes_in_bf16_only_where_the_device_does(
    device: str, machine: dict[str, bool], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_machine(monkeypatch, **machine)
    assert muon_arithmetic(device) == dtype
