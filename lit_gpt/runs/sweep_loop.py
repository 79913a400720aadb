"""The processes of a sweep: several `lit_gpt fit` at a time, started, watched, ended and accounted for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from lit_gpt.console.messages import note
from lit_gpt.runs.record import CurvePoint, RunRecord
from lit_gpt.runs.sweep_options import EqualBudget
from lit_gpt.runs.sweep_plan import PlannedRun, RunStatus
from lit_gpt.runs.sweep_source import RunSource

PARTS = 10
"""A search compares runs after each tenth of their budget."""

_TICK = 0.1  # seconds between two checks of the processes
_CURVE_TICK = 1.0  # seconds between two readings of the curves
_SAVING_SECONDS = 120.0  # that a run which was asked to stop has to save
_LOG_TAIL = 8192  # bytes of a log in which the reason of a failure is looked for


def start_child(
    words: Sequence[str], environment: Mapping[str, str], log: Any, keep: Sequence[int] = ()
) -> subprocess.Popen[bytes]:
    """`python -m WORDS` as a process that ends with this one, in a group of its own: Ctrl+C is for this one alone.

    Args:
        words: a module and its arguments.
        environment: of the process.
        log: a file for its stdout and stderr; None for stderr alone, and nothing of the former.
        keep: descriptors that it inherits.
    """
    # Not the folder of the moment: it may be one of texts with a numpy.py in it.
    paths = [*(entry for entry in sys.path if entry not in ("", ".")), str(Path(__file__).resolve().parents[2])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lit_gpt.runs.child", *words],
        stdin=subprocess.PIPE,  # which ends with this process
        stdout=subprocess.DEVNULL if log is None else log,
        stderr=log,
        env={**environment, "PYTHONPATH": os.pathsep.join(paths)},
        pass_fds=keep,
        process_group=0,
    )


def check_fits(
    configs: Sequence[str],
    flags: Sequence[Sequence[str]],
    budget: EqualBudget | None,
    environment: Mapping[str, str],
) -> list[dict[str, Any]]:
    """What `lit_gpt.cli.fit_check` says of these command lines of `fit`: `config`, or `error`, for each.

    Raises:
        RuntimeError: it has failed; its own line says why.
    """
    limit = None if budget is None else [budget.unit, budget.amount]
    with TemporaryDirectory() as folder:
        question, answer = Path(folder) / "question.json", Path(folder) / "answer.json"
        question.write_text(json.dumps({"configs": configs, "flags": flags, "budget": limit}), "utf-8")
        child = start_child(["lit_gpt.cli.fit_check", str(question), str(answer)], environment, None)
        try:
            status = child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise
        if status != 0:
            raise RuntimeError(f"the check of the configurations {describe_status(status)}")
        found: list[dict[str, Any]] = json.loads(answer.read_text("utf-8"))
        return found


def describe_status(status: int) -> str:
    """How a process ended, from its `returncode`."""
    if status >= 0:
        return f"ended with status {status}"
    reason = ", as when memory runs out" if -status == signal.SIGKILL else ""
    return f"was ended by {signal.Signals(-status).name}{reason}"


@dataclass
class RunningFit:
    """A run and its process.

    Attributes:
        run: of the plan.
        process: of its `fit`.
        steps: that it makes in all; None where time alone ends it.
        reported: the tenths of its budget that the source knows of.
        is_pruned: whether it was asked to stop, for being worse than others.
        asked_at: when it was asked to stop.
    """

    run: PlannedRun
    process: subprocess.Popen[bytes]
    steps: int | None
    reported: set[int] = field(default_factory=set)
    is_pruned: bool = False
    asked_at: float | None = None

    def stop(self) -> None:
        """Ask it to save and end; kill it if it has been asked long ago."""
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.process.terminate()
        elif now - self.asked_at > _SAVING_SECONDS:
            self.process.kill()


class SweepLoop:
    """Makes the runs of a source, some at a time, until there are no more or a signal comes.

    Attributes:
        stopped_by: the number of that signal, 0 for none.
    """

    def __init__(
        self,
        source: RunSource,
        jobs: int,
        budget: EqualBudget | None,
        watches_curves: bool,
        environment: Mapping[str, str],
        lock: int,
    ) -> None:
        """Runs to be made.

        Args:
            source: of the runs.
            jobs: how many at a time.
            budget: of each.
            watches_curves: whether the source is told of the validations while a run goes on.
            environment: of the processes.
            lock: a descriptor that all processes inherit, so that they hold the lock too.
        """
        self._source, self._jobs, self._budget = source, jobs, budget
        self._watches_curves, self._environment, self._lock = watches_curves, environment, lock
        self._running: list[RunningFit] = []
        self._curves_at = 0.0
        self.stopped_by = 0

    def run(self) -> None:
        """Make them all. What a signal has stopped goes on when the sweep does."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while self._fill() or self._running:
                self._collect()
                self._read_curves()
                time.sleep(_TICK)
        finally:
            for running in self._running:
                running.process.kill()
                running.process.wait()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stopped_by = self.stopped_by or number

    def _fill(self) -> bool:
        """Start runs until there are enough; whether one was started."""
        started = False
        while not self.stopped_by and len(self._running) < self._jobs:
            run = self._source.claim()
            if run is None:
                break
            record = run.record()
            if record is not None and record.finished:  # the sweep was killed before it could write that down
                self._account(run, 0, False)
                continue
            self._running.append(self._start(run))
            started = True
        return started

    def _start(self, run: PlannedRun) -> RunningFit:
        words, checkpoint = ["lit_gpt", "fit", "--config", str(run.fit_file)], run.last_checkpoint()
        if checkpoint is not None:
            words += ["--ckpt_path", str(checkpoint)]
        else:  # what a killed run has left without a checkpoint is begun anew
            shutil.rmtree(run.folder / "lightning_logs", ignore_errors=True)
        note(f"{run.label}: " + ("goes on" if checkpoint is not None else "begins"))
        with run.log_file.open("ab") as log:
            process = start_child(words, self._environment, log, [self._lock])
        steps = run.config()["trainer"]["max_steps"]
        return RunningFit(run, process, steps if steps > 0 else None)

    def _collect(self) -> None:
        """Account for the runs that have ended; ask the others to stop where the sweep was asked to."""
        for running in list(self._running):
            status = running.process.poll()
            if status is None:
                if self.stopped_by or running.is_pruned:
                    running.stop()
                continue
            self._running.remove(running)
            if running.process.stdin is not None:
                running.process.stdin.close()
            if status == 0 or not self.stopped_by:
                self._account(running.run, status, running.is_pruned)

    def _account(self, run: PlannedRun, status: int, is_pruned: bool) -> None:
        """Write down how a run has ended, and say so."""
        ended = run_status(run, status, is_pruned)
        self._source.end(run, ended)
        if ended.state == "failed":
            note(f"{run.label}: failed: {ended.why}")
        else:
            note(f"{run.label}: {ended.state}, loss {ended.loss:.4f} at step {ended.step}")

    def _read_curves(self) -> None:
        """Tell the source which tenths of their budgets runs have passed, and stop those that it says."""
        now = time.monotonic()
        if not self._watches_curves or self._budget is None or now - self._curves_at < _CURVE_TICK:
            return
        self._curves_at = now
        for running in self._running:
            record = running.run.record()
            if record is None or running.is_pruned or running.asked_at is not None:
                continue
            for part, value in finished_parts(record, self._budget, running.steps).items():
                if part not in running.reported and not running.is_pruned:
                    running.reported.add(part)
                    running.is_pruned = self._source.report(running.run, part, value)


def finished_parts(record: RunRecord, budget: EqualBudget, steps: int | None) -> dict[int, float]:
    """Tenths of its budget that a run has passed, the last excepted → its lowest loss up to there.

    Args:
        record: of the run.
        budget: that all runs have.
        steps: that the run makes, where it is not time that ends it.
    """
    shares = [(share, point.loss) for point in record.curve if (share := _share(point, budget, steps)) is not None]
    parts: dict[int, float] = {}
    for part in range(1, PARTS):
        losses = [loss for share, loss in shares if share <= part / PARTS + 1e-9]
        if losses and shares[-1][0] >= part / PARTS - 1e-9:
            parts[part] = min(losses)
    return parts


def _share(point: CurvePoint, budget: EqualBudget, steps: int | None) -> float | None:
    if budget.unit == "time":
        return None if point.seconds is None else point.seconds / budget.amount
    return None if steps is None else point.step / steps


def run_status(run: PlannedRun, status: int, is_pruned: bool) -> RunStatus:
    """How a run has ended.

    Args:
        run: of the plan.
        status: its process's `returncode`.
        is_pruned: whether it was asked to stop, for being worse than others.
    """
    record = run.record()
    point = None if record is None else record.point
    stopped = is_pruned and status in (128 + signal.SIGTERM, -signal.SIGTERM, -signal.SIGKILL)
    if point is None or not (status == 0 or stopped):
        reason = "it made no validation: trainer.val_check_interval is longer than the run" if status == 0 else ""
        return RunStatus("failed", reason or _last_line(run.log_file) or describe_status(status))
    folder = "" if record is None else str(record.folder)
    return RunStatus("pruned" if stopped else "finished", "", point.loss, point.bits_per_byte, point.step, folder)


def _last_line(log: Path) -> str:
    """The line in which `fit` says why it has ended; "" if there is none."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    said = [
        line.removeprefix("lit_gpt: ") for line in lines if line.startswith(("lit_gpt: error:", "lit_gpt: failed:"))
    ]
    return said[-1].removeprefix("error: ").removeprefix("failed: ") if said else ""
