"""A stop for runs whose loss became NaN or infinite, before their last good checkpoint is overwritten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_gpt.batch import Batch
from lit_gpt.train.callbacks.run_paths import path_from_here, saved_path
from lit_gpt.train.module import LitGPT


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite."""


class NonFiniteStop(Callback):
    """Stops a run whose loss is no longer a number, and keeps it from overwriting its last good checkpoint.

    Each loss is checked on the device; the host asks only when something is logged, validated or saved.
    """

    def __init__(self) -> None:
        self._unchecked: list[tuple[int, int, int]] = []  # (step, epoch, batch) of micro-batches since the last check
        self._first_bad: Tensor | None = None  # () int64 on the device: index into them, the largest int if none is bad

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Record whether this micro-batch's loss is a number; check where the step is logged."""
        assert isinstance(pl_module, LitGPT)
        loss = outputs["loss"].detach()
        if self._first_bad is None:
            self._first_bad = torch.full((), torch.iinfo(torch.int64).max, device=loss.device)
        candidate = torch.where(loss.isfinite(), self._first_bad, len(self._unchecked))
        self._first_bad = torch.minimum(self._first_bad, candidate)
        self._unchecked.append((trainer.global_step, trainer.current_epoch, batch_idx))
        if pl_module.logs_now:
            self._check(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before time is spent on validation."""
        self._check(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before a good checkpoint is overwritten."""
        self._check(trainer)

    def _check(self, trainer: L.Trainer) -> None:
        """Raise NonFiniteLoss if a loss since the last check was no number, on any rank."""
        if self._first_bad is None:
            return
        first = int(trainer.strategy.reduce(self._first_bad, reduce_op="min"))
        unchecked, self._unchecked, self._first_bad = self._unchecked, [], None
        if first >= len(unchecked):
            return
        for callback in trainer.checkpoint_callbacks:
            callback.save_on_exception = False  # type: ignore[attr-defined]
        step, epoch, batch = unchecked[first]
        raise NonFiniteLoss(
            f"the loss is not finite at step {step}, epoch {epoch}, batch {batch} of the data; "
            f"{_good_checkpoint(trainer)} and a lower learning rate or gradient_clip_val may get past it"
        )


def _good_checkpoint(trainer: L.Trainer) -> str:
    """The clause of the message that says what to go on from."""
    paths = [Path(saved_path(callback)) for callback in trainer.checkpoint_callbacks if saved_path(callback)]
    found = [path for path in paths if path.exists()]
    if not found:
        return "no checkpoint was written before it; a new run"
    latest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return f"the last good checkpoint is {path_from_here(latest)}; to go on from it"
