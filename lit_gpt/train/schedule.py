"""Learning rate schedules: warm-up and decay as a factor on the peak rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from lit_gpt.errors import UserError, nearest

ScheduleName = Literal["cosine", "linear", "wsd", "constant"]

_FIRST = 0.1
"""The factor at which a warm-up by share begins. One by steps begins above 0 as well: no step is wasted."""


@dataclass(frozen=True)
class ScheduleConfig:
    """How the learning rate changes over a run, as a factor on each group's peak.

    A run with a budget of time (`trainer.max_time`) follows the share of the budget that is spent, others count steps.

    Attributes:
        name: after the warm-up `cosine` or `linear` falls to `min_lr_ratio` at the last step, `wsd` stays at the
            peak and falls linearly at the end (arXiv 2404.06395), `constant` stays.
        warmup: linear warm-up: a number of steps, or below 1 a share of the run.
        min_lr_ratio: the last learning rate as a share of the peak.
        decay: length of `wsd`'s fall: a number of steps, or below 1 a share of the run.
    """

    name: ScheduleName = "cosine"
    warmup: float = 0.02
    min_lr_ratio: float = 0.1
    decay: float = 0.2

    def __post_init__(self) -> None:
        """Check every value. Raises UserError, naming it and the remedy."""
        if self.name not in get_args(ScheduleName):
            raise UserError(f'unknown schedule name "{self.name}": {nearest(str(self.name), get_args(ScheduleName))}')
        for name in ("warmup", "decay"):
            value = getattr(self, name)
            if value < 0 or (value > 1 and value != int(value)):
                raise UserError(f"{name}={value} must be a whole number of steps, or below 1 a share of the run")
        if not 0 <= self.min_lr_ratio <= 1:
            raise UserError(f"min_lr_ratio={self.min_lr_ratio} is a share of the peak: choose a value in [0, 1]")

    def factor(self, total_steps: int) -> Callable[[int], float]:
        """The factor on the peak rate, as a function of the number of optimizer steps done.

        Args:
            total_steps: length of the run in optimizer steps; -1 for a run without end, which only `constant` allows.

        Raises:
            UserError: when the schedule needs an end and there is none, or warm-up and decay do not fit into the run.
        """
        if total_steps < 0:
            if self.name != "constant" or 0 < self.warmup < 1:
                raise UserError("a run without max_steps or max_epochs has no end to schedule for: set one of them")
            total_steps = 0
        warmup, decay = _steps(self.warmup, total_steps), _steps(self.decay, total_steps)
        if self.name == "wsd" and warmup + decay > total_steps:
            raise UserError(f"warmup={warmup} and decay={decay} steps exceed the run of {total_steps}: shorten them")
        if self.name in ("cosine", "linear") and warmup >= total_steps:
            raise UserError(f"warmup={warmup} steps is no shorter than the run of {total_steps}: shorten it")
        start = total_steps - decay if self.name == "wsd" else warmup
        return lambda step: self._at(step, warmup, start, total_steps)

    def factor_of_share(self, max_steps: int = -1) -> Callable[[float], float]:
        """The factor on the peak rate, as a function of the share of the run that is over, in [0, 1].

        Args:
            max_steps: optimizer steps of the whole run, which say what share a warm-up given in steps is; -1 if time
                alone ends it.

        Raises:
            UserError: when warm-up or decay are steps and `max_steps` is not given, or they do not fit into the run.
        """
        warmup = self._share("warmup", max_steps)
        decay = self._share("decay", max_steps) if self.name == "wsd" else 0.0
        if self.name != "constant" and (warmup >= 1 or warmup + decay > 1):
            given = f"warmup={self.warmup:g}" + (f" and decay={self.decay:g}" if decay else "")
            raise UserError(f"{given} exceed the run: shorten them")
        start = 1 - decay if self.name == "wsd" else warmup

        def factor(share: float) -> float:
            if share < warmup:
                return _FIRST + (1 - _FIRST) * share / warmup
            if self.name == "constant" or share < start:
                return 1.0
            return self._fall(min(1.0, (share - start) / (1 - start)) if start < 1 else 1.0)

        return factor

    def _share(self, name: str, max_steps: int) -> float:
        """`warmup` or `decay` as a share of the run."""
        value: float = getattr(self, name)
        if value < 1:
            return value
        if max_steps <= 0:
            raise UserError(
                f"{name}={value:g} steps: a run that trainer.max_time ends has no fixed number of steps; give a share "
                f"of the run below 1, or trainer.max_steps too"
            )
        return value / max_steps

    def _at(self, step: int, warmup: int, start: int, end: int) -> float:
        """The factor at `step`, with the fall running from `start` to `end`."""
        if step < warmup:
            return (step + 1) / (warmup + 1)
        if self.name == "constant" or step < start:
            return 1.0
        return self._fall(min(1.0, (step - start) / max(1, end - start)))

    def _fall(self, done: float) -> float:
        """The factor where the share `done` of the fall is over."""
        height = 0.5 * (1 + math.cos(math.pi * done)) if self.name == "cosine" else 1 - done
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * height


def _steps(value: float, total: int) -> int:
    """A number of steps, or below 1 a share of `total`, in whole steps."""
    return round(value * total) if value < 1 else int(value)
