"""Runs that end well on SIGTERM and Ctrl+C: between two batches, on all ranks, with status 143 and 130."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from lit_gpt.batch import Batch
from lit_gpt.train.lightning_fixes import StopRequest, exit_on_sigterm, set_signal_status
from lit_gpt.train.module import LitGPT


class StopOnSignal(Callback):
    """Stops a `fit` after an optimizer step or a batch of validation; `LastCheckpoint` then saves it."""

    def __init__(self) -> None:
        self._request = StopRequest()

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signals from here on."""
        self._request.install(trainer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signals, where no validation came before."""
        self._request.install(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """After each optimizer step the ranks agree on whether one of them received a signal."""
        assert isinstance(pl_module, LitGPT)
        if pl_module.stepped:
            self._request.agree(trainer, pl_module.device)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: int
    ) -> None:
        """They agree after each batch of validation too, which may be a long one. A resumed run begins it again."""
        self._request.agree(trainer, pl_module.device)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exit with the signal's status."""
        set_signal_status(trainer, exception, self._request.number)


class ExitOnSigterm(Callback):
    """Ends `validate`, `test` and `predict` at once on SIGTERM: they have nothing to save."""

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signal."""
        exit_on_sigterm(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signal."""
        exit_on_sigterm(trainer)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle the signal."""
        exit_on_sigterm(trainer)
