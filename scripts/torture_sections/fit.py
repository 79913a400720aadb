"""Training runs, killed until they are finished: their final bits are those of a run that nobody disturbed."""

from __future__ import annotations

import signal
from pathlib import Path
from random import Random

from torture_sections.children import run
from torture_sections.faults import BYTE, STOPS, stop_once
from torture_sections.materials import check_readable, checkpoints, must_end, tiny_fit
from torture_sections.section import Section

WAYS: dict[str, dict[str, float]] = {
    "killed while a checkpoint was written": {"fsync": 0.4, "replace": 0.2, BYTE: 0.0},
    "killed in a validation": {"validation step": 0.33},
    "killed in a training step": {"training step": 2.0},
    "killed at a random time": {},
}
"""Where the kills are aimed: fault points, and how many calls of each there are to a step; one is chosen."""
KILLS_OF_A_RUN = 14
"""After which it is left alone to its end."""
CTRL_C_TWICE = (signal.SIGINT, signal.SIGINT)


class FitSection(Section):
    """A trial is one training run, from its first process to its last checkpoint."""

    name = "fit"
    share = 30
    short_trials = 1
    least_kills = 100

    def set_up(self) -> None:
        """The undisturbed run."""
        self.fit = tiny_fit(self.root, self.short)
        (last,) = checkpoints(self.fit.folder / "whole")
        calls = {name: {point: int(n * self.fit.steps) for point, n in points.items()} for name, points in WAYS.items()}
        self.ways = calls | {next(iter(WAYS)): calls[next(iter(WAYS))] | {BYTE: 4 * last.stat().st_size}}

    def has_enough(self) -> bool:
        """A hundred kills."""
        return sum(self.tally(way).count for way in WAYS) >= self.least_kills

    def trial(self, random: Random) -> None:
        """Kill until the run is finished, then compare."""
        folder = self.fresh()
        with self.trying("whole runs, resumed to their end: all bits of weights, optimizer, loops, best.ckpt"):
            for number in range(4 if self.short else KILLS_OF_A_RUN):
                if self._was_finished(folder, list(WAYS)[(number + self.number) % len(WAYS)], random):
                    break
            else:
                must_end(run(folder, self.fit.work(folder)), 0)
            self.fit.check_whole(folder)

    def _was_finished(self, folder: Path, way: str, random: Random) -> bool:
        """One process of the run, which is to be killed; whether it reached the end of the run."""
        with self.trying(way, count=0) as tally:
            work, points = self.fit.work(folder), self.ways[way]
            stopped = stop_once(folder, work, random, points, self.fit.seconds, ".ckpt", (*STOPS, CTRL_C_TWICE))
            if not stopped.count(tally):
                return True
            check_readable(folder)
        return False
