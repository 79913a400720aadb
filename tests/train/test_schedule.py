"""Learning rate schedules against PyTorch's own."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lit_gpt.errors import UserError
from lit_gpt.train.schedule import ScheduleConfig


def test_cosine_and_linear_are_torchs_after_the_warm_up() -> None:
    weight = nn.Parameter(torch.zeros(1))
    for name in ("cosine", "linear"):
        factor = ScheduleConfig(name=name, warmup=10, min_lr_ratio=0.1).factor(110)
        sgd = torch.optim.SGD([weight], lr=1.0)
        reference = (
            torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=100, eta_min=0.1)
            if name == "cosine"
            else torch.optim.lr_scheduler.LinearLR(sgd, 1.0, 0.1, total_iters=100)
        )
        for step in range(10, 111):
            assert factor(step) == pytest.approx(reference.get_last_lr()[0], rel=1e-6)
            sgd.step()
            reference.step()
        assert [factor(step) for step in range(10)] == pytest.approx([(step + 1) / 11 for step in range(10)])


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.integers(20, 5000),
    st.one_of(st.integers(0, 10), st.floats(0, 0.5)),
    st.one_of(st.integers(0, 10), st.floats(0, 0.4)),
    st.floats(0, 1),
)
def test_every_schedule_rises_then_never_does_again(
    name: str, total: int, warmup: float, decay: float, low: float
) -> None:
    factor = ScheduleConfig(name=name, warmup=warmup, decay=decay, min_lr_ratio=low).factor(total)
    values = [factor(step) for step in range(total + 1)]
    top = round(warmup * total) if warmup < 1 else int(warmup)
    assert all(0 < a < b for a, b in pairwise(values[: top + 1]))
    assert values[top] == pytest.approx(1.0)
    assert all(a >= b - 1e-12 for a, b in pairwise(values[top:]))
    if name in ("cosine", "linear"):
        assert values[-1] == pytest.approx(low, abs=1e-9)
    if name == "wsd":
        length = round(decay * total) if decay < 1 else int(decay)
        assert all(value == 1.0 for value in values[top : total - length])
        assert length == 0 or values[-1] == pytest.approx(low, abs=1e-9)


def test_a_share_of_the_run_scales_with_it() -> None:
    schedule = ScheduleConfig(name="wsd", warmup=0.1, decay=0.5, min_lr_ratio=0.0)
    assert [schedule.factor(100)(step) for step in (10, 50, 75)] == [schedule.factor(1000)(s) for s in (100, 500, 750)]


@given(
    st.sampled_from(["cosine", "linear", "wsd", "constant"]),
    st.floats(0, 0.5),
    st.floats(0, 0.4),
    st.floats(0, 1),
)
def test_a_schedule_of_the_share_rises_then_never_does_again(
    name: str, warmup: float, decay: float, low: float
) -> None:
    factor = ScheduleConfig(name=name, warmup=warmup, decay=decay, min_lr_ratio=low).factor_of_share()
    shares = sorted({*(number / 200 for number in range(201)), warmup, 1 - decay})
    rising = [factor(share) for share in shares if share <= warmup]
    falling = [factor(share) for share in shares if share >= warmup]
    assert all(0 < a <= b for a, b in pairwise(rising))
    assert all(a >= b - 1e-12 for a, b in pairwise(falling))
    assert falling[0] == pytest.approx(1.0)
    assert all(0 <= value <= 1 for value in [*rising, *falling])
    if name in ("cosine", "linear"):
        assert factor(1.0) == pytest.approx(low, abs=1e-9)
    if name == "wsd":
        assert factor(1.0) == pytest.approx(low, abs=1e-9)
        assert all(factor(share) == 1.0 for share in shares if warmup <= share < 1 - decay)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_by_share_a_run_of_many_steps_has_the_rates_that_it_has_by_steps(name: str) -> None:
    schedule = ScheduleConfig(name=name, warmup=100, decay=2000, min_lr_ratio=0.2)
    by_step, by_share = schedule.factor(10_000), schedule.factor_of_share(10_000)
    for step in range(100, 10_001, 50):
        assert by_share(step / 10_000) == pytest.approx(by_step(step), abs=1e-6)
    assert by_share(0.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("make", "needle"),
    [
        (lambda: ScheduleConfig(warmup=100).factor_of_share(), "warmup=100 steps: a run that trainer.max_time ends"),
        (lambda: ScheduleConfig(warmup=100).factor_of_share(100), "warmup=100 exceed the run"),
        (lambda: ScheduleConfig(name="wsd", decay=50).factor_of_share(), "decay=50 steps: a run that trainer.max_time"),
        (lambda: ScheduleConfig(name="wsd", warmup=0.6, decay=0.5).factor_of_share(), "warmup=0.6 and decay=0.5"),
        (lambda: ScheduleConfig(name="cosinus"), 'did you mean "cosine"'),  # type: ignore[arg-type]
        (lambda: ScheduleConfig(warmup=2.5), "warmup=2.5"),
        (lambda: ScheduleConfig(warmup=100).factor(100), "warmup=100 steps is no shorter than the run of 100"),
        (lambda: ScheduleConfig(name="wsd", warmup=60, decay=60).factor(100), "exceed the run of 100"),
        (lambda: ScheduleConfig().factor(-1), "no end to schedule for"),
    ],
)
def test_bad_values_are_named(make: object, needle: str) -> None:
    with pytest.raises(UserError) as error:
        make()  # type: ignore[operator]
    assert needle in str(error.value)
    assert "\n" not in str(error.value)
