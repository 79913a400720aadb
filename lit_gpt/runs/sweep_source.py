"""The source of a sweep's runs: a list; what machines share is in `search.py`."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple, Protocol

from lit_gpt.runs.grid import Values
from lit_gpt.runs.sweep_plan import PlannedRun, RunStatus


class SweepResult(NamedTuple):
    """One line of a sweep's results.

    Attributes:
        number: of the run.
        values: of the keys that differ between runs.
        seed: where the sweep makes several runs of each configuration.
        status: how it has ended; None if it has not.
        machine: that made it, "" for this one.
    """

    number: int
    values: Values
    seed: int | None
    status: RunStatus | None
    machine: str = ""


class RunSource(Protocol):
    """Hands out the runs of a sweep and learns how they end."""

    def claim(self) -> PlannedRun | None:
        """The next run to make, which nobody else makes; None if there is none."""

    def report(self, run: PlannedRun, part: int, value: float) -> bool:
        """Whether to end a run early, of which `value` is the lowest so far after `part` tenths of its budget."""

    def end(self, run: PlannedRun, status: RunStatus) -> None:
        """Write down how a run has ended."""

    def results(self) -> list[SweepResult]:
        """All runs of the sweep, those of other machines too."""


class ListedRuns:
    """The runs of a grid or of random draws, in their order."""

    def __init__(self, runs: list[PlannedRun]) -> None:
        self._runs = runs
        self._open = deque(run for run in runs if run.status() is None)

    def claim(self) -> PlannedRun | None:
        """The next one that has not ended."""
        return self._open.popleft() if self._open else None

    def report(self, run: PlannedRun, part: int, value: float) -> bool:
        """False: all runs of a list are made to their end."""
        return False

    def end(self, run: PlannedRun, status: RunStatus) -> None:
        """Write down how a run has ended."""
        run.end(status)

    def results(self) -> list[SweepResult]:
        """All runs."""
        return [SweepResult(run.number, run.values, run.seed, run.status()) for run in self._runs]
