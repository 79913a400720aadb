"""A budget of time: what is spent of it, when a run stops, and how a resumed one goes on. The clocks are pretended."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
from fork_server import ForkServer
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from training import TINY, Batches, losses, module, trainer

from lit_gpt.checkpoint.format import load_checkpoint, read_header
from lit_gpt.errors import UserError
from lit_gpt.train import budget as budget_module
from lit_gpt.train.budget import Budget, parse_duration, share_spent
from lit_gpt.train.callbacks.checkpoints import LastCheckpoint
from lit_gpt.train.schedule import ScheduleConfig

HERE = Path(__file__).resolve().parent


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:00:03:00", 180),
        ("1:02:03:04", 93784),
        (" 00:00:00:01 ", 1),
        (timedelta(minutes=2), 120),
        ({"minutes": 1, "seconds": 5}, 65),
    ],
)
def test_durations_are_lightnings(text: Any, seconds: int) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("3 minutes", "trainer.max_time=3 minutes is no duration: write DD:HH:MM:SS"),
        ("00:03:00", "is no duration"),
        ("-1:00:00:00", "is no duration"),
        ("٠٠:٠٠:٠٣:٠٠", "is no duration"),
        ("999999999999:00:00:00", "is no duration"),
        ({"fortnights": 1}, "is no duration"),
        ({"days": 10**12}, "is no duration"),
        ("00:00:00:00", "must be above zero"),
        ({"minutes": -1}, "must be above zero"),
    ],
)
def test_other_durations_are_named(text: Any, needle: str) -> None:
    with pytest.raises(UserError) as error:
        parse_duration(text)
    assert needle in str(error.value)
    assert "\n" not in str(error.value)


@given(st.floats(0, 1e6), st.floats(-10, 1e6), st.integers(0, 10**6), st.integers(-1, 10**6))
def test_the_share_is_the_further_of_time_and_steps(seconds: float, limit: float, steps: int, most: int) -> None:
    share = share_spent(seconds, limit, steps, most)
    assert 0 <= share <= 1
    assert share_spent(seconds + 1, limit, steps + 1, most) >= share
    by_time = share_spent(seconds, limit, 0, -1)
    by_steps = share_spent(0, 1, steps, most)
    assert share == max(by_time, by_steps)


class Clock(Callback):
    """A machine on which a step, a batch of validation and what follows a validation take as long as it says."""

    def __init__(self, step: float, evaluation: float = 0.0, samples: float = 0.0, start: float = 0.0) -> None:
        self.now, self.step, self.evaluation, self.samples, self.start = 0.0, step, evaluation, samples, start
        self.validations: list[int] = []

    def monotonic(self) -> float:
        return self.now

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self.now += self.start

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.now += self.step / trainer.accumulate_grad_batches

    def on_validation_batch_end(self, *_: Any) -> None:
        self.now += self.evaluation

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.now += self.samples
        self.validations.append(trainer.global_step)

    def on_train_end(self, *_: Any) -> None:
        self.now += self.samples


def fit(
    folder: Path, seconds: float, clock: Clock, monkeypatch: pytest.MonkeyPatch, ckpt_path: Path | None = None,
    rows: int = 4000, schedule: ScheduleConfig | None = None, **options: Any,
) -> tuple[L.Trainer, Budget]:  # fmt: skip
    for used in ("lightning.pytorch.callbacks.timer.time", "lit_gpt.train.budget.time"):
        monkeypatch.setattr(used, SimpleNamespace(monotonic=clock.monotonic))
    budget = Budget(timedelta(seconds=seconds))
    run = trainer(
        folder,
        **{"callbacks": [budget, clock, LastCheckpoint()], "enable_checkpointing": True,
        "val_check_interval": 20, "check_val_every_n_epoch": None, "max_epochs": -1, **options},
    )  # fmt: skip
    schedule = schedule or ScheduleConfig(name="linear", warmup=0.1, min_lr_ratio=0.0)
    run.fit(
        module(schedule=schedule, config=replace(TINY, n_layer=1)),
        Batches(rows, 4),
        Batches(16, 4),
        ckpt_path=ckpt_path,
    )
    return run, budget


@pytest.mark.slow
@pytest.mark.parametrize("step", [1.0, 4.0])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validates_before", [True, False])
def test_a_slow_machine_ends_the_run_inside_its_budget_with_the_rate_at_its_end(
    step: float, accumulate: int, validates_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four batches of validation, a third of a training batch each, and two seconds of samples after it."""
    clock = Clock(step, evaluation=step / accumulate / 3, samples=2.0, start=3.0)
    interval = 6 * accumulate if validates_before else 10_000
    run, _ = fit(
        tmp_path, 60.0, clock, monkeypatch, accumulate_grad_batches=accumulate, max_steps=1000,
        val_check_interval=interval,
    )  # fmt: skip
    assert 60 - 3 * step - 8 < clock.now <= 60
    assert clock.validations[-1] == run.global_step, "the last step is validated"
    assert clock.validations.count(run.global_step) == 1
    rates = losses(run, "lr/matrices")
    assert max(rates.values()) > 0.9 * 6e-4
    assert rates[run.global_step] <= 0.1 * 6e-4
    assert losses(run, "budget/share")[run.global_step] > 0.9
    if not validates_before:
        assert rates[run.global_step] == 0.0
        assert rates[run.global_step - 1] < 0.1 * 6e-4


@pytest.mark.slow
def test_a_fast_machine_ends_the_run_by_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(0.1, evaluation=0.01)
    run, _ = fit(tmp_path, 60.0, clock, monkeypatch, max_steps=50)
    assert run.global_step == 50
    assert clock.validations == [20, 40], "as a run without a budget: what time does not end gets no other validation"
    shares = losses(run, "budget/share")
    assert shares == pytest.approx({step: step / 50 for step in range(1, 51)})
    assert losses(run, "lr/matrices")[50] == 0.0
    said = capsys.readouterr().err
    assert "budget: 0:01:00 for training, validation and samples\n" in said
    assert "of 60 s spent by step 50\n" in said


@pytest.mark.slow
def test_the_first_step_may_be_slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with `torch.compile`: what it takes is spent, but says nothing about the steps and validations to come."""

    class SlowStart(Clock):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            self.now += 20.0 if trainer.global_step == 0 else self.step

    clock = SlowStart(0.5, evaluation=0.2)
    run, _ = fit(tmp_path, 40.0, clock, monkeypatch, val_check_interval=10_000)
    assert run.global_step > 28
    assert clock.now <= 40


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_the_share_spent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Clock(1.0, evaluation=0.3, samples=1.0)
    whole, _ = fit(tmp_path / "whole", 60.0, straight, monkeypatch)
    fit(tmp_path / "first", 60.0, Clock(1.0, evaluation=0.3, samples=1.0), monkeypatch, max_steps=20)
    last = next((tmp_path / "first").rglob("last.ckpt"))
    checkpoint = load_checkpoint(last)
    assert checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] == pytest.approx(20 + 4 * 0.3 + 1)
    rest, budget = fit(tmp_path / "rest", 60.0, Clock(1.0, evaluation=0.3, samples=1.0), monkeypatch, last)
    assert rest.global_step == pytest.approx(whole.global_step, abs=1)
    assert budget.time_elapsed() <= 60
    assert min(losses(rest, "budget/share")) == 21
    for step in (22, 30, rest.global_step - 1):
        assert losses(rest, "budget/share")[step] == pytest.approx(losses(whole, "budget/share")[step], abs=0.03)
        assert losses(rest, "lr/matrices")[step] == pytest.approx(losses(whole, "lr/matrices")[step], abs=3e-5)


@pytest.mark.slow
def test_a_run_stopped_in_the_last_validation_of_its_budget_repeats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stopped(Clock):
        def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            super().on_validation_batch_end()
            if trainer.should_stop:
                raise SIGTERMException

    def clock() -> Clock:
        return Clock(1.0, evaluation=0.3)

    whole = clock()
    made, _ = fit(tmp_path / "whole", 30.0, whole, monkeypatch)
    with pytest.raises(SIGTERMException):
        fit(tmp_path / "first", 30.0, Stopped(1.0, evaluation=0.3), monkeypatch)
    again = clock()
    rest, budget = fit(tmp_path / "rest", 30.0, again, monkeypatch, next((tmp_path / "first").rglob("last.ckpt")))
    assert rest.global_step == made.global_step
    assert again.validations == whole.validations[-1:] == [made.global_step]
    assert losses(rest, "val/loss")[made.global_step] == losses(made, "val/loss")[made.global_step]
    assert budget.time_elapsed() <= 30.0


@pytest.mark.slow
def test_a_resumed_run_whose_budget_is_spent_makes_no_step_and_a_longer_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, _ = fit(tmp_path / "one", 30.0, Clock(1.0, evaluation=0.3), monkeypatch)
    last = next((tmp_path / "one").rglob("last.ckpt"))
    capsys.readouterr()
    same, _ = fit(tmp_path / "same", 30.0, Clock(1.0, evaluation=0.3), monkeypatch, last)
    assert same.global_step == made.global_step == read_header(last).step
    assert "s of it spent before" in capsys.readouterr().err
    more, _ = fit(tmp_path / "more", 45.0, Clock(1.0, evaluation=0.3), monkeypatch, last)
    assert made.global_step + 10 < more.global_step < 45


@pytest.mark.slow
def test_a_run_that_time_ended_goes_on_in_the_middle_of_its_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning counts the epoch in which `should_stop` came as done; epochs here have 25 batches."""
    options: dict[str, Any] = {
        "rows": 100,
        "limit_val_batches": 0,
        "val_check_interval": 1.0,
        "check_val_every_n_epoch": 1,
    }
    made, _ = fit(tmp_path / "one", 16.0, Clock(1.0), monkeypatch, **options)
    assert 10 < made.global_step < 16
    last = next((tmp_path / "one").rglob("last.ckpt"))
    more, _ = fit(tmp_path / "more", 1000.0, Clock(1.0), monkeypatch, last, **{**options, "max_epochs": 2})
    assert more.global_step == 50


@pytest.mark.parametrize(("seconds", "clock"), [(2.0, Clock(1.0)), (1.0, Clock(0.1, start=2.0))])
def test_a_budget_of_less_than_a_few_steps_is_refused(
    seconds: float, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"^trainer.max_time=0:00:0\d is too short: .*; give at least 0:00:\d\d$"):
        fit(tmp_path, seconds, clock, monkeypatch)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_the_trainer_gets_a_budget_for_its_max_time() -> None:
    options: dict[str, Any] = {"max_time": "00:00:03:00", "callbacks": [Callback()], "max_steps": 3}
    budget_module.set_budget(options)
    assert options["max_time"] is None
    assert isinstance(options["callbacks"][1], Budget)
    options = {"max_steps": 3}
    budget_module.set_budget(options)
    assert options == {"max_steps": 3}


@pytest.mark.slow
def test_all_ranks_have_the_share_and_the_rate_of_rank_0(fork_server: ForkServer, tmp_path: Path) -> None:
    """Their own clocks say different things: rank 1's runs three times as fast."""
    asked = {"devices": 2, "strategy": "ddp", "max_steps": 12, "budget": 600, "skew": 200.0, "schedule": "linear"}
    for done in fork_server.run_ranks(2, HERE / "parallel_run.py", tmp_path, json.dumps(asked)):
        assert done.returncode == 0, done.stderr[-2000:]
    rates = [json.loads((tmp_path / f"rates_{rank}.json").read_text()) for rank in (0, 1)]
    assert len(rates[0]) == 12
    assert rates[0] == rates[1]
    assert len({share for share, _ in rates[0]}) > 6
