"""A run's budget of time: the share of it that is spent, and a stop in time for the last validation and samples."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections import deque
from datetime import timedelta
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import RunningStage

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError

Duration = str | timedelta | dict[str, int]

MIN_STEPS = 3
"""Optimizer steps: a budget that does not allow as many is refused."""

_EVALUATION_COST = 0.5  # of a validation batch in training batches, as long as none has been timed: no backward pass
_FINISH_SHARE = 0.03  # of the budget, for the samples and checkpoints at the end, as long as none have been timed
_MARGIN = 1.2  # of what was measured: a validation, samples or a step may take longer the next time
_TIMED_STEPS = 15
"""The latest ones, whose median is the time of a step: no single slow one counts, and not the first."""


def parse_duration(duration: Duration) -> timedelta:
    """The value of `trainer.max_time`: DD:HH:MM:SS, a timedelta, or its parameters.

    Raises:
        UserError: for anything else, and for what is not above zero.
    """
    parsed: timedelta | None = None
    if isinstance(duration, timedelta):
        parsed = duration
    elif isinstance(duration, str):
        if found := re.fullmatch(r"(\d{1,6}):(\d\d):(\d\d):(\d\d)", duration.strip(), re.ASCII):
            days, hours, minutes, seconds = map(int, found.groups())
            parsed = timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    elif isinstance(duration, dict):
        try:
            parsed = timedelta(**duration)
        except (TypeError, OverflowError):
            parsed = None
    if parsed is None:
        raise UserError(
            f"trainer.max_time={duration} is no duration: write DD:HH:MM:SS, as 00:00:03:00 for three minutes"
        )
    if parsed <= timedelta(0):
        raise UserError(f"trainer.max_time={duration} must be above zero: 00:00:03:00 is three minutes")
    return parsed


def share_spent(seconds: float, limit: float, steps: int, max_steps: int) -> float:
    """The share of a run that is over, in [0, 1]: by time or by steps, whichever is further.

    Args:
        seconds: spent.
        limit: seconds after which training stops.
        steps: optimizer steps made.
        max_steps: after which training stops; -1 for none.
    """
    by_time = seconds / limit if limit > 0 else 1.0
    by_steps = steps / max_steps if max_steps > 0 else 0.0
    return min(1.0, max(by_time, by_steps))


class Budget(Timer):
    """Lightning's Timer as a budget of a whole `fit`, which the learning rate follows.

    The clock runs from the beginning of `fit`, validations included, and over resumed runs. What the last validation
    and the samples after it will take is kept back: as long as the latest one took, or an estimate before there was
    one. All ranks have the share that rank 0's clock says.

    Attributes:
        share: of the budget, or of `max_steps`, that was over after the latest optimizer step; it never falls.
        max_steps: optimizer steps of the whole run, -1 where time alone ends it.
    """

    def __init__(self, duration: Duration) -> None:
        self._budget = parse_duration(duration)
        super().__init__(self._budget, verbose=False)
        self.share = 0.0
        self.max_steps = -1
        self._steps: deque[float] = deque(maxlen=_TIMED_STEPS)  # seconds of optimizer steps
        self._pause: float | None = None  # seconds of the latest validation, with what comes after it
        self._finish: float | None = None  # of these, seconds of samples and checkpoints
        self._mark: float | None = None  # when the latest step ended; None where other work came between
        self._stopped_at = 0.0  # when the latest batch ended
        self._evaluated_at: float | None = None  # when a validation ended, up to the next batch

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint, the one of `Timer`: runs that had that go on."""
        return Timer.__qualname__

    def state_dict(self) -> dict[str, Any]:
        """The time spent, and what the end of the run is expected to take."""
        return {**super().state_dict(), "pause": self._pause, "finish": self._finish}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        super().load_state_dict(state_dict)
        self._pause, self._finish = state_dict.get("pause"), state_dict.get("finish")

    # The share ---------------------------------------------------------------------------------------------------

    def advance(self, trainer: L.Trainer) -> float:
        """The share after an optimizer step, the same on all ranks: call it there on each of them."""
        now = time.monotonic()
        if self._mark is not None:
            self._steps.append(now - self._mark)
        self._mark = now
        return self._agree(trainer)

    def _agree(self, trainer: L.Trainer, ahead: float = 0.0) -> float:
        """Set the share to what rank 0 will have spent in `ahead` seconds."""
        limit = self._budget.total_seconds() - self._kept_back(trainer)
        share = share_spent(self.time_elapsed() + ahead, limit, trainer.global_step, self.max_steps)
        self.share = trainer.strategy.broadcast(max(self.share, share))
        return self.share

    def _kept_back(self, trainer: L.Trainer) -> float:
        """Seconds for one more step, the last validation, and what comes after it."""
        step = statistics.median(self._steps) if len(self._steps) >= MIN_STEPS else 0.0
        finish = self._finish_seconds
        batches = sum(trainer.num_val_batches)
        if batches == 0:
            return step + finish
        if self._pause is not None:
            return _MARGIN * (step + self._pause + finish)
        evaluation = _EVALUATION_COST * batches * step / trainer.accumulate_grad_batches
        return step + 2 * finish + (evaluation if math.isfinite(evaluation) else 0.0)

    @property
    def _finish_seconds(self) -> float:
        """Of samples and checkpoints, which come after a validation and at the end of the run."""
        return _FINISH_SHARE * self._budget.total_seconds() if self._finish is None else self._finish

    def _is_spent(self, trainer: L.Trainer) -> bool:
        """Whether it is time that ends the run: after the last step the Trainer stops by itself."""
        return self.share >= 1 and not 0 <= self.max_steps <= trainer.global_step

    # Hooks -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The clock starts."""
        if stage == "fit":
            self._start_time[RunningStage.TRAINING] = time.monotonic()
            self._end_time[RunningStage.TRAINING] = None

    def on_fit_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Nothing: sharded strategies have not restored the time spent yet."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say what the budget is. A resumed run that has spent it makes no further step, but ends its validation."""
        self.share, self._mark, self._evaluated_at = 0.0, None, None
        self._agree(trainer)
        spent = f", {self._offset:.0f} s of it spent before" if self._offset else ""
        if trainer.is_global_zero:
            note(f"budget: {self._budget} for training, validation and samples{spent}")
        if self._is_spent(trainer) and not getattr(pl_module, "repeats_validation", False):
            self._stop(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Time what came between two batches, if that was a validation."""
        now = time.monotonic()
        if self._evaluated_at is not None:
            self._pause, self._finish = now - self._stopped_at, now - self._evaluated_at
            self._mark = self._evaluated_at = None
        if self._mark is None and batch_idx % trainer.accumulate_grad_batches == 0:
            self._mark = now

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop the run if the budget is spent."""
        self._stopped_at = time.monotonic()
        if self._is_spent(trainer):
            self._stop(trainer)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What follows is for samples and checkpoints."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._evaluated_at = time.monotonic()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Where no time is left for another validation this one was the last."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == "fit" and not trainer.sanity_checking and not trainer.should_stop:
            self._agree(trainer, self._finish_seconds)
            if self._is_spent(trainer):
                self._stop(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line about the time that was spent."""
        super().on_train_end(trainer, pl_module)
        if trainer.is_global_zero:
            by_time = "; time ended the run" if self._is_spent(trainer) else ""
            spent, whole = self.time_elapsed(), self._budget.total_seconds()
            note(f"budget: {spent:.1f} of {whole:.0f} s spent by step {trainer.global_step}{by_time}")

    def _stop(self, trainer: L.Trainer) -> None:
        """End the run after this step. Raises UserError if it has made next to none."""
        trainer.should_stop = True
        if trainer.global_step >= MIN_STEPS:
            return
        for callback in trainer.checkpoint_callbacks:
            callback.save_on_exception = False  # type: ignore[attr-defined]
        needed = self.time_elapsed() + MIN_STEPS * max(self._steps, default=0.0) + 2 * self._kept_back(trainer)
        raise UserError(
            f"trainer.max_time={self._budget} is too short: {self.time_elapsed():.1f} s are over after "
            f"{trainer.global_step} steps, and the last validation and samples need about "
            f"{self._kept_back(trainer):.1f} s; give at least {timedelta(seconds=int(needed) + 1)}"
        )


def budget_of(trainer: L.Trainer) -> Budget | None:
    """The budget of a run that has one."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, Budget)), None)  # type: ignore[attr-defined]


def set_budget(options: dict[str, Any]) -> None:
    """Replace `max_time` among a Trainer's options by a `Budget`, if they have it."""
    if options.get("max_time") is None:
        return
    callbacks = options.get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    options.update(max_time=None, callbacks=[*callbacks, Budget(options["max_time"])])
