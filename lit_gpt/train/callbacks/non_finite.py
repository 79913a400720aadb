"""A stop for runs whose loss, gradient or weights are no numbers any more, before a good checkpoint is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from lit_gpt.batch import Batch
from lit_gpt.console.messages import note
from lit_gpt.train.callbacks.run_paths import path_from_here, saved_path
from lit_gpt.train.lightning_fixes import log_scalars
from lit_gpt.train.module import LitGPT
from lit_gpt.train.optim import are_finite

MAX_SKIPPED_IN_A_ROW = 20
"""Optimizer steps. A gradient scaler skips a few at its start; after 20 halvings of its scale nothing overflows."""


class NonFiniteError(RuntimeError):
    """The loss, the weights or many gradients in a row are NaN or infinite."""


class NonFiniteStop(Callback):
    """Stops a run whose numbers are no numbers any more, and keeps it from replacing its last good checkpoint.

    The module skips steps with a non-finite gradient, which are counted here. Loss and gradient are checked on the
    device in every step; the host asks only when something is logged, validated or saved, and checks the weights
    when something is saved.

    Attributes:
        skipped_steps: of this run and those that it resumed from, as of the last check.
    """

    def __init__(self) -> None:
        self.skipped_steps = 0
        self._unchecked: list[tuple[int, int, int]] = []  # (step, epoch, batch) of micro-batches since the last check
        self._first_bad: Tensor | None = None  # () int64 on the device: index into them, the largest int if none is bad
        self._skipped: Tensor | None = None  # (3,) int64 on the device: steps since the last check, in a row, the most

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps."""
        return {"skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.skipped_steps = state_dict["skipped_steps"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Record whether this micro-batch's loss and this step's gradient are numbers; check if the step is logged."""
        assert isinstance(pl_module, LitGPT)
        loss = outputs["loss"].detach()
        if self._first_bad is None:
            self._first_bad = torch.full((), torch.iinfo(torch.int64).max, device=loss.device)
        candidate = torch.where(loss.isfinite(), self._first_bad, len(self._unchecked))
        self._first_bad = torch.minimum(self._first_bad, candidate)
        self._unchecked.append((trainer.global_step, trainer.current_epoch, batch_idx))
        if pl_module.stepped and pl_module.skipped is not None:
            self._count(pl_module.skipped)
        if pl_module.logs_now:
            self._check(trainer, pl_module)

    def _count(self, skipped: Tensor) -> None:
        if self._skipped is None:
            self._skipped = torch.zeros(3, dtype=torch.int64, device=skipped.device)
        total, in_a_row, most = self._skipped.unbind()
        in_a_row = (in_a_row + 1) * skipped
        self._skipped = torch.stack([total + skipped, in_a_row, torch.maximum(most, in_a_row)])

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Check before time is spent on validation."""
        self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Check before a good checkpoint is replaced, the weights too."""
        self._check(trainer, pl_module)
        if not are_finite(pl_module.parameters()):
            _stop(trainer, f"the weights are not finite after step {trainer.global_step}")

    def _check(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raise NonFiniteError if a loss since the last check was no number, on any rank, or too many gradients."""
        if self._first_bad is None:
            return
        first = int(trainer.strategy.reduce(self._first_bad, reduce_op="min"))
        unchecked, self._unchecked, self._first_bad = self._unchecked, [], None
        most = self._report_skipped(trainer, module)
        if first < len(unchecked):
            step, epoch, batch = unchecked[first]
            _stop(trainer, f"the loss is not finite at step {step}, epoch {epoch}, batch {batch} of the data")
        if most >= MAX_SKIPPED_IN_A_ROW:
            _stop(trainer, f"the gradient was not finite in {most} steps in a row, by step {trainer.global_step}")

    def _report_skipped(self, trainer: L.Trainer, module: L.LightningModule) -> int:
        """Log the steps that were skipped since the last check; the most in a row."""
        if self._skipped is None:
            return 0
        total, in_a_row, most = self._skipped.tolist()
        self._skipped = torch.tensor([0, in_a_row, in_a_row], device=self._skipped.device)
        if total:
            self.skipped_steps += total
            log_scalars(module, {"train/skipped_steps": self.skipped_steps})
            if trainer.is_global_zero:
                steps = f"{total} optimizer step{'s' if total > 1 else ''}"
                note(f"{steps} skipped by step {trainer.global_step}: the gradient was not finite")
        return most


def _stop(trainer: L.Trainer, fault: str) -> NoReturn:
    """Raise NonFiniteError, and have nothing saved on the way out."""
    for callback in trainer.checkpoint_callbacks:
        callback.save_on_exception = False  # type: ignore[attr-defined]
    raise NonFiniteError(
        f"{fault}; {_good_checkpoint(trainer)} and a lower learning rate or gradient_clip_val may get past it"
    )


def _good_checkpoint(trainer: L.Trainer) -> str:
    """The clause of the message that says what to go on from."""
    paths = [Path(saved_path(callback)) for callback in trainer.checkpoint_callbacks if saved_path(callback)]
    found = [path for path in paths if path.exists()]
    if not found:
        return "no checkpoint was written before it; a new run"
    latest = max(found, key=lambda path: path.stat().st_mtime_ns)
    return f"the last good checkpoint is {path_from_here(latest)}; to go on from it"
