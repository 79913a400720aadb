"""Paths of a run's checkpoints and logs, as its messages show them."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger


def saved_path(callback: Callback) -> str:
    """The file that a checkpoint callback has written, "" if there is none."""
    return getattr(callback, "best_model_path", "")


def log_root(trainer: L.Trainer) -> str:
    """The folder of all runs that `tensorboard --logdir` opens."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            return logger.root_dir
    return trainer.default_root_dir


def path_from_here(path: str | Path) -> str:
    """The path relative to the working directory where it is inside, else as it is."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_absolute() and path.is_relative_to(Path.cwd()) else str(path)
