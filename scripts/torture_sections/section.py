"""A section of the torture: numbered, seeded trials, what was tried in them, and what was lost."""

from __future__ import annotations

import shutil
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


class Wrong(Exception):
    """Something was lost, or an answer was wrong."""


def check(condition: object, message: str) -> None:
    """Raise Wrong with `message` unless the condition holds."""
    if not condition:
        raise Wrong(message)


@dataclass
class Tally:
    """What was tried in one way: a line of the table.

    Attributes:
        section: its name.
        what: was tried.
        count: how often.
        wrong: a line for each time that something was lost or wrong.
        seconds: that it took.
        details: counts that the line shows behind `what`.
        remark: shown behind `what`, too: a measurement, or why the trial was skipped.
        how: the fault or the input of the present trial, for the line about it if it is wrong.
    """

    section: str
    what: str
    count: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    details: Counter[str] = field(default_factory=Counter)
    remark: str = ""
    how: str = ""

    def line(self) -> str:
        """The line of the Markdown table."""
        shown = [*(f"{name} {count}" for name, count in sorted(self.details.items())), *filter(None, [self.remark])]
        what = f"{self.what} ({', '.join(shown)})" if shown else self.what
        return f"| {self.section} | {what} | {self.count:,} | {len(self.wrong)} | {self.seconds:.0f} |"


class Section(ABC):
    """Trials of one kind. Each has random numbers of its own, so that one can be repeated without those before it.

    Attributes:
        folder: to work in; of this section alone.
        root: shared by all sections, for what several of them need.
        short: make do with the smallest example of everything.
        number: of the present trial.
        tallies: of all that was tried so far.
    """

    name: ClassVar[str]
    share: ClassVar[float]
    """Its part of the time, as a weight."""
    short_trials: ClassVar[int]
    """How many trials the short form has."""

    def __init__(self, root: Path, short: bool, seed: int) -> None:
        self.root, self.short, self.seed, self.number = root, short, seed, 0
        self.folder = root / self.name
        self.folder.mkdir()
        self.tallies: list[Tally] = []
        self._inner_seconds = 0.0  # of what was tried within the present one

    def tally(self, what: str) -> Tally:
        """The tally of that name, made when it is first asked for."""
        found = next((tally for tally in self.tallies if tally.what == what), None)
        if found is None:
            found = Tally(self.name, what)
            self.tallies.append(found)
        return found

    @contextmanager
    def trying(self, what: str, count: int = 1) -> Iterator[Tally]:
        """Count and time the body; what it raises is noted as wrong, and the trials go on.

        One may be within another: its seconds are its own then.
        """
        tally, began = self.tally(what), time.monotonic()
        outer_seconds, self._inner_seconds = self._inner_seconds, 0.0
        tally.count += count
        tally.how = ""
        try:
            yield tally
        except Exception as error:
            text = str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
            how = f"{tally.how}: " if tally.how else ""
            tally.wrong.append(f"{self.name}, trial {self.number}: {what}: {how}{' '.join(text.split())}")
            print(f"torture: WRONG: {tally.wrong[-1]}", file=sys.stderr, flush=True)
        finally:
            seconds = time.monotonic() - began
            tally.seconds += seconds - self._inner_seconds
            self._inner_seconds = outer_seconds + seconds

    def fresh(self, name: str = "trial") -> Path:
        """An empty folder for this trial; the last trial's is removed, unless something was wrong in it."""
        previous = [path for path in self.folder.glob(f"{name}-*") if not self._was_wrong(path)]
        for path in previous:
            shutil.rmtree(path)
        folder = self.folder / f"{name}-{self.number}"
        folder.mkdir()
        return folder

    def _was_wrong(self, folder: Path) -> bool:
        number = folder.name.rpartition("-")[2]
        return any(f"{self.name}, trial {number}:" in line for tally in self.tallies for line in tally.wrong)

    @abstractmethod
    def set_up(self) -> None:
        """Make what the trials compare with."""

    @abstractmethod
    def trial(self, random: Random) -> None:
        """Try once."""

    def has_enough(self) -> bool:
        """Whether the section may end when its time has passed."""
        return True

    def finish(self) -> None:  # noqa: B027 (most have nothing to do)
        """Look at what can only be seen after all trials, and end what is still running."""


def drawn(strategy: st.SearchStrategy[Any], count: int, number: int) -> list[Any]:
    """`count` values of a hypothesis strategy, decided by the seed `number`."""
    values: list[Any] = []

    @seed(number)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(value: Any) -> None:
        values.append(value)

    collect()
    return values
