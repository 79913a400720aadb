"""Loggers that a `fit` can have beside TensorBoard's, by a short name: MLflow, Weights & Biases, CSV.

TensorBoard's files are written in any case. What these add: MLflow a run in a local database, Weights & Biases an
offline run in the run's folder, CSV one table there. A resumed run goes on in its own.
"""

from __future__ import annotations

import csv
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args
from uuid import uuid4

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from lit_gpt.console.messages import note
from lit_gpt.errors import UserError, nearest
from lit_gpt.files.atomic import atomic_write
from lit_gpt.files.locks import InUse, Lock
from lit_gpt.train.callbacks.run_paths import path_from_here

LoggerName = Literal["tensorboard", "mlflow", "wandb", "csv"]
LOGGERS: tuple[str, ...] = get_args(LoggerName)

_PROJECT = "lit_gpt"
_SQLITE = "sqlite:///"
_STORE_SECONDS = 120.0  # that MLflow may need to make its tables, on a slow disk
_PACKAGES = {"mlflow": "MLflow", "wandb": "Weights & Biases"}


def check_logger(logger: object) -> None:
    """Refuse a name that is none of ours, and one whose package is not installed.

    Args:
        logger: the value of `trainer.logger`, of any kind.

    Raises:
        UserError: with the nearest name, or the package to install.
    """
    if not isinstance(logger, str):
        return
    if logger not in LOGGERS:
        raise UserError(f'trainer.logger="{logger}" is unknown: {nearest(logger, LOGGERS)}')
    if logger in _PACKAGES and find_spec(logger) is None:
        raise UserError(
            f'trainer.logger={logger} needs {_PACKAGES[logger]}: pip install "lit_gpt[{logger}]", or leave it out'
        )


def is_own_logger(logger: object) -> bool:
    """Whether the value of `trainer.logger` leaves the run's folder to the program: a short name, or nothing."""
    return logger is None or logger is True or (isinstance(logger, str) and logger in LOGGERS)


def further_loggers(logger: object, folder: Path) -> list[Logger]:
    """What the run in `folder` has beside TensorBoard's logger. For rank 0 alone: one process writes to a store.

    Args:
        logger: the value of `trainer.logger`.
        folder: of the run, which exists.

    Raises:
        UserError: the store cannot be used.
    """
    make = _FURTHER.get(logger) if isinstance(logger, str) else None
    if make is None:
        return []
    try:
        return [make(folder)]
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(
            f"trainer.logger={logger} cannot be set up: {reason}; correct its address or settings, or leave it out"
        ) from error


def run_id_in(folder: Path, logger: str, new: str) -> str:
    """The id that the run in `folder` has in the store of `logger`: the one of its first part, or else `new`."""
    file = folder / f"{logger}_run.txt"
    if file.is_file():
        return file.read_text("utf-8").strip()
    with atomic_write(file, "w") as opened:
        opened.write(f"{new}\n")
    return new


# MLflow --------------------------------------------------------------------------------------------------------------


def make_mlflow_logger(folder: Path) -> MLFlowLogger:
    """MLflow's logger: its store is `$MLFLOW_TRACKING_URI`, or the file mlflow.db beside the run folders."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # it would send figures of use to its maker
    address = os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{folder.parent.resolve() / 'mlflow.db'}"
    if not address.startswith(_SQLITE):
        return _open_mlflow_run(folder, address, None)
    database = Path(address.removeprefix(_SQLITE))
    database.parent.mkdir(parents=True, exist_ok=True)
    with _alone_with(database):
        logger = _open_mlflow_run(folder, address, (database.resolve().parent / "mlflow_artifacts").as_uri())
    note(f"mlflow: mlflow ui --backend-store-uri {_SQLITE}{path_from_here(database)}")
    return logger


@contextmanager
def _alone_with(database: Path) -> Iterator[None]:
    """Keep other runs from the file: MLflow makes its tables twice, and fails, where two begin at the same time."""
    deadline = time.monotonic() + _STORE_SECONDS
    while True:
        try:
            lock = Lock(database, f"{database}: another run has been making its tables for {_STORE_SECONDS:.0f} s")
            break
        except InUse:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.release(remove=True)


def _open_mlflow_run(folder: Path, address: str, artifacts: str | None) -> MLFlowLogger:
    """The logger of the MLflow run that the run in `folder` has, or of a new one."""
    name, file = path_from_here(folder.resolve()), folder / "mlflow_run.txt"
    options: dict[str, Any] = {"experiment_name": _PROJECT, "tracking_uri": address, "run_name": name}
    options["artifact_location"] = artifacts
    if file.is_file():
        resumed = ResumableMLFlowLogger(**options, run_id=file.read_text("utf-8").strip())
        if resumed.is_known():
            return resumed
        note(f"mlflow: the store has no run {resumed.run_id_asked}, which {file} names: a new one is begun")
        file.unlink()
    logger = ResumableMLFlowLogger(**options)
    run_id_in(folder, "mlflow", str(logger.run_id))
    return logger


class ResumableMLFlowLogger(MLFlowLogger):
    """MLflow's logger of a run that may be stopped and go on, with other options too.

    MLflow refuses another value for a parameter that it has: what the run began with stays.
    """

    def __init__(self, run_id: str | None = None, **options: Any) -> None:
        super().__init__(run_id=run_id, **options)
        self.run_id_asked = run_id

    def is_known(self) -> bool:
        """Whether the store has the run that was asked for; it is marked as running again."""
        from mlflow.exceptions import MlflowException

        try:
            self.experiment.update_run(self.run_id_asked, status="RUNNING")
        except MlflowException:
            return False
        return True

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Log those that the run does not have yet."""
        known = self.experiment.get_run(self.run_id).data.params
        flat = _flatten_dict(_convert_params(params))
        super().log_hyperparams({name: value for name, value in flat.items() if name not in known})


# Weights & Biases ----------------------------------------------------------------------------------------------------


def make_wandb_logger(folder: Path) -> WandbLogger:
    """The logger of Weights & Biases, which sends nothing unless `WANDB_MODE` says `online`."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    mode = os.environ.get("WANDB_MODE", "offline")
    if mode == "offline":
        shown = path_from_here(folder.resolve() / "wandb")
        note(f"wandb: offline; `wandb sync {shown}/offline-run-*` sends it, WANDB_MODE=online would at once")
    return FinishingWandbLogger(
        name=path_from_here(folder.resolve()),
        save_dir=folder,
        version=run_id_in(folder, "wandb", uuid4().hex[:12]),
        project=os.environ.get("WANDB_PROJECT", _PROJECT),
        mode=mode,
    )


class FinishingWandbLogger(WandbLogger):
    """The logger of Weights & Biases, whose run ends with the `fit`: the next one of this process begins its own."""

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all, and end the run."""
        super().finalize(status)
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


# CSV -----------------------------------------------------------------------------------------------------------------


class AppendingCSVLogger(CSVLogger):
    """`metrics.csv` in the run's folder, to which a resumed run appends: Lightning's would remove it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder.parent.parent, folder.parent.name, folder.name, flush_logs_every_n_steps=1)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer of the file."""
        if self._experiment is None:
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment  # type: ignore[return-value]

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: they stand in hparams.yaml beside the file, which TensorBoard's logger writes."""


class _AppendingWriter(ExperimentWriter):
    """Lightning's writer over a file that may be there; no kill leaves less than there was."""

    def _check_log_dir_exists(self) -> None:
        """Keep the rows of the run's first part: the columns go on from its header."""
        path = Path(self.metrics_file_path)
        if not path.is_file():
            return
        text = path.read_text("utf-8")
        self.metrics_keys = next(csv.reader(text.splitlines()), [])
        if text and not text.endswith("\n"):  # of a run that was killed while it wrote
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _rewrite_with_new_header(self, fieldnames: Sequence[str]) -> None:
        path = Path(self.metrics_file_path)
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        with atomic_write(path, "w") as file:
            writer = csv.DictWriter(file, fieldnames, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)


_FURTHER: dict[str, Callable[[Path], Logger]] = {
    "csv": AppendingCSVLogger,
    "mlflow": make_mlflow_logger,
    "wandb": make_wandb_logger,
}
