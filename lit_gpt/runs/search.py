"""Runs that Optuna chooses, or hands out to several machines: its trials are the runs of a sweep.

A search asks it for values. A grid or random draws that machines share are trials too, of which each names the number
of a run in the plan that all machines have made alike.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import socket
import warnings
from collections import deque
from collections.abc import Callable
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_gpt.errors import UserError
from lit_gpt.runs.grid import SweptKey, Values
from lit_gpt.runs.sweep_options import without_password
from lit_gpt.runs.sweep_plan import PlannedRun, RunStatus
from lit_gpt.runs.sweep_source import SweepResult

if TYPE_CHECKING:
    import optuna

JOURNAL = "journal:"
_SURPLUS = "surplus"  # of a trial that another one stands for
_NETWORK = ("nfs", "cifs", "smb", "fuse.sshfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "9p", "afs")
_FIRST_PARTS = 2  # tenths of the budget, in which no run is ended
_UNOWNED_SECONDS = 60.0  # between the start of a trial and what says whose it is, at most

MakeRun = Callable[[int, Values], PlannedRun | str]
"""Writes the files of a run with this number and these values; a line if `fit` would refuse them."""


def open_study(storage: str, name: str, prune: bool) -> optuna.Study:
    """The study that a sweep's trials are in, made if it is not there.

    Args:
        storage: `journal:FILE`, or the address of a database.
        name: of the study, the same on all machines.
        prune: whether trials are ended early.

    Raises:
        UserError: the storage cannot be used.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    pruner: Any = optuna.pruners.NopPruner()
    if prune:
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=_FIRST_PARTS)
    try:
        return optuna.create_study(
            storage=_open_storage(storage), study_name=name, direction="minimize", pruner=pruner, load_if_exists=True
        )
    except Exception as error:
        reason = without_password(" ".join(str(error).split()))[:300] or type(error).__name__
        raise UserError(
            f"--storage {without_password(storage)} cannot be used: {reason}; correct it, or install its driver"
        ) from error


def _open_storage(storage: str) -> Any:
    if not storage.startswith(JOURNAL):
        return storage
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(storage.removeprefix(JOURNAL)))


def check_search(storage: str) -> None:
    """Refuse to begin without Optuna, or with a storage that it must not have.

    Raises:
        UserError: naming what to install or to give.
    """
    if find_spec("optuna") is None:
        raise UserError('Optuna is not installed: pip install "lit_gpt[sweep]"')
    check_storage(storage)


def check_storage(storage: str) -> None:
    """Refuse what is no storage, and a SQLite file that several machines could reach.

    Raises:
        UserError: naming what to give.
    """
    if storage.startswith(JOURNAL):
        folder = Path(storage.removeprefix(JOURNAL)).resolve().parent
        if not folder.is_dir():
            raise UserError(f"--storage {storage}: there is no folder {folder}; make it, or name another")
        return
    if not re.match(r"\w+(\+\w+)?://.", storage):
        raise UserError(
            f"--storage {storage} is no address: give postgresql://USER:PASSWORD@HOST/NAME, or journal:FILE in "
            "a folder that all machines see"
        )
    if storage.startswith("sqlite"):
        file = Path(storage.partition("://")[2].removeprefix("/").partition("?")[0])
        kind = file_system(file.resolve().parent)
        if kind.startswith(_NETWORK):
            raise UserError(
                f"--storage {storage}: {file} is on a network file system ({kind}), where machines that share it would "
                f"damage SQLite's file: give journal:{file.with_suffix('.journal')}, or a database's address"
            )


def file_system(folder: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The kind of file system that `folder` is on; "" where the system does not say.

    Args:
        folder: which need not exist.
        mounts: the system's list of what is mounted.
    """
    try:
        lines = mounts.read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    kinds = {fields[1].replace("\\040", " "): fields[2] for line in lines if len(fields := line.split()) > 2}
    return next((kinds[str(parent)] for parent in (folder, *folder.parents) if str(parent) in kinds), "")


class StudyRuns:
    """Runs that are trials of a study.

    A machine that dies leaves its trials running: its own sweep goes on with them when it is started again.
    """

    def __init__(
        self,
        study: optuna.Study,
        output: Path,
        own: list[PlannedRun],
        count: int,
        metric: str,
        keys: list[SweptKey] | None = None,
        make_run: MakeRun | None = None,
        seed: int = 0,
        is_shared: bool = True,
    ) -> None:
        """Take part in a study.

        Args:
            study: open.
            output: folder of this machine's part of the sweep.
            own: runs with files there: all of the plan, or those that a search has made here before.
            count: of all runs, on all machines.
            metric: what is minimised.
            keys: what a search draws; None for runs of a plan.
            make_run: for a search.
            seed: of its draws.
            is_shared: whether there are other machines, which must draw other values.
        """
        self._study, self._output, self._count, self._metric = study, output, count, metric
        self._keys, self._make_run, self._seed = keys, make_run, seed
        self._owner = f"{socket.gethostname()}:{output.resolve()}"
        self._draws_as = self._owner if is_shared else ""
        self._runs = {run.number: run for run in own}
        self._close_unowned(is_shared)
        if keys is None:
            self._enqueue()
        self._trials: dict[int, int] = {}  # run → trial
        self._resumed = deque(self._find_own())

    # Which trial is which run ------------------------------------------------------------------------------------

    def _all(self, *states: Any) -> list[Any]:
        """The trials that count, in their order."""
        trials = self._study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in trials if not trial.user_attrs.get(_SURPLUS)]

    def _enqueue(self) -> None:
        known = {trial.user_attrs.get("run") for trial in self._all()}
        for number in range(self._count):
            if number not in known:
                self._study.enqueue_trial({"run": number}, user_attrs={"run": number})

    def _close_unowned(self, is_shared: bool) -> None:
        """Close trials whose machine was killed before it could say that they are its own: they are made anew."""
        from optuna.trial import TrialState

        for trial in self._all(TrialState.RUNNING):
            age = (datetime.now() - trial.datetime_start).total_seconds() if trial.datetime_start else math.inf
            if "owner" not in trial.user_attrs and (not is_shared or age > _UNOWNED_SECONDS):
                self._close_surplus(trial.number)

    def _run_of(self, trial: Any) -> int:
        return int(trial.user_attrs["run"]) if self._keys is None else int(trial.number)

    def _find_own(self) -> list[PlannedRun]:
        """The runs that were begun here and have not ended; a trial that was asked for and got no files is closed."""
        from optuna.trial import TrialState

        found = []
        for trial in self._all(TrialState.RUNNING):
            if trial.user_attrs.get("owner") != self._owner:
                continue
            run = self._runs.get(self._run_of(trial))
            if run is None:
                self._close_surplus(trial.number)
                continue
            self._trials[run.number] = trial.number
            found.append(run)
        return found

    def _close_surplus(self, number: int) -> None:
        from optuna.trial import TrialState

        self._trial(number).set_user_attr(_SURPLUS, True)
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)

    def _frozen(self, number: int) -> Any:
        return next(trial for trial in self._study.get_trials(deepcopy=False) if trial.number == number)

    def _trial(self, number: int) -> Any:
        from optuna.trial import Trial

        return Trial(self._study, self._frozen(number)._trial_id)

    # The source of runs ------------------------------------------------------------------------------------------

    def claim(self) -> PlannedRun | None:
        """A run that was begun here before, or else the next trial."""
        while self._resumed:
            run = self._resumed.popleft()
            status = run.status()
            if status is None:
                return run
            self._tell(run, status)  # it was killed between the two
        return self._next_listed() if self._keys is None else self._next_drawn()

    def _next_listed(self) -> PlannedRun | None:
        from optuna.distributions import IntDistribution
        from optuna.trial import TrialState

        while self._all(TrialState.WAITING):
            asked = self._study.ask({"run": IntDistribution(0, max(1, self._count - 1))})
            number = int(asked.params["run"])
            if asked.user_attrs.get("run") != number or self._is_twice(asked.number, number):
                self._close_surplus(asked.number)  # another machine was faster, or has enqueued it too
                continue
            asked.set_user_attr("owner", self._owner)
            self._trials[number] = asked.number
            return self._runs[number]
        return None

    def _is_twice(self, trial_number: int, run_number: int) -> bool:
        return any(trial.number < trial_number and trial.user_attrs.get("run") == run_number for trial in self._all())

    def _next_drawn(self) -> PlannedRun | None:
        assert self._keys is not None and self._make_run is not None
        while len(trials := self._all()) < self._count:
            self._study.sampler = self._sampler(len(trials))
            asked = self._study.ask({key.key: _distribution(key) for key in self._keys})
            earlier = sum(trial.number < asked.number for trial in self._all())
            if earlier >= self._count:
                self._close_surplus(asked.number)
                return None
            asked.set_user_attr("owner", self._owner)
            values = {key.key: _text(key, asked.params[key.key]) for key in self._keys}
            run = self._make_run(asked.number, values)
            if isinstance(run, PlannedRun):
                self._runs[run.number], self._trials[run.number] = run, asked.number
                return run
            self._refuse(asked.number, values, run)
        return None

    def _refuse(self, number: int, values: Values, why: str) -> None:
        """A run that `fit` would refuse is a line of the results."""
        run = PlannedRun(number, values, None, self._output / "runs" / f"{number:04d}")
        self._runs[number], self._trials[number] = run, number
        self.end(run, RunStatus("failed", why))

    def _sampler(self, trials: int) -> Any:
        """A sampler whose random numbers depend on how many trials there are, so that none are drawn twice."""
        import optuna

        text = f"{self._seed} {trials} {self._draws_as}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")
        return optuna.samplers.TPESampler(seed=seed)

    def report(self, run: PlannedRun, part: int, value: float) -> bool:
        """Whether the run is worse than half of the others were at that part of their budgets."""
        trial = self._trial(self._trials[run.number])
        if part not in self._frozen(self._trials[run.number]).intermediate_values:  # by a sweep that was killed
            trial.report(value, part)
        return bool(trial.should_prune())

    def end(self, run: PlannedRun, status: RunStatus) -> None:
        """Tell the study, then write it down here."""
        self._tell(run, status)
        run.end(status)

    def _tell(self, run: PlannedRun, status: RunStatus) -> None:
        from optuna.trial import TrialState

        number, value = self._trials[run.number], status.value(self._metric)
        self._trial(number).set_user_attr("status", _shareable(status))
        if status.state == "finished" and value is not None:
            self._study.tell(number, value, skip_if_finished=True)
        else:
            state = TrialState.PRUNED if status.state == "pruned" else TrialState.FAIL
            self._study.tell(number, state=state, skip_if_finished=True)

    def results(self) -> list[SweepResult]:
        """All runs, those of other machines too."""
        return sorted((self._result(trial) for trial in self._all()), key=lambda result: result.number)

    def _result(self, trial: Any) -> SweepResult:
        number, owner, told = self._run_of(trial), trial.user_attrs.get("owner", ""), trial.user_attrs.get("status")
        own, is_own = self._runs.get(number), owner == self._owner
        status = own.status() if own is not None and is_own else None
        if status is None and told is not None:
            status = RunStatus(**told)
        if own is not None and (is_own or self._keys is None):
            values, seed = own.values, own.seed
        else:
            values, seed = self._values_of(trial), None
        return SweepResult(number, values, seed, status, "" if is_own else owner.partition(":")[0])

    def _values_of(self, trial: Any) -> Values:
        return {key.key: _text(key, trial.params[key.key]) for key in self._keys or () if key.key in trial.params}


def _distribution(key: SweptKey) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if key.choices:
        return CategoricalDistribution(key.choices)
    if key.is_whole:
        return IntDistribution(int(key.low), int(key.high), log=key.is_log)
    return FloatDistribution(key.low, key.high, log=key.is_log)


def _text(key: SweptKey, value: Any) -> str:
    return str(value) if key.choices else key.text_of(float(value))


def _shareable(status: RunStatus) -> dict[str, Any]:
    """How a run has ended, for other machines: its folder as an absolute path."""
    return {**status._asdict(), "run": os.path.abspath(status.run) if status.run else ""}
