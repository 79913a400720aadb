"""The two checkpoints of a run: the best by validation loss, and the last."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint


def best_checkpoint() -> ModelCheckpoint:
    """`best.ckpt`: the weights with the lowest `val/loss` so far."""
    return ModelCheckpoint(filename="best", monitor="val/loss", mode="min", enable_version_counter=False)


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`: the state after each validation, at the end, and when a run is interrupted.

    One name, written over whole by `AtomicCheckpointIO`: there is no moment without a good file.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_exception=True, enable_version_counter=False)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what came after the last validation."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
