"""A run that ends well when it receives SIGTERM: after a whole optimizer step, on all ranks, with status 143."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback

from lit_gpt.batch import Batch
from lit_gpt.train.lightning_fixes import SigtermRequest, set_sigterm_status
from lit_gpt.train.module import LitGPT


class SigtermStop(Callback):
    """Stops the run on SIGTERM; `LastCheckpoint` then saves it."""

    def __init__(self) -> None:
        self._request = SigtermRequest()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Handle SIGTERM from here on."""
        self._request.install(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """After each optimizer step the ranks agree on whether one of them received SIGTERM."""
        assert isinstance(pl_module, LitGPT)
        if pl_module.stepped:
            self._request.agree(trainer, pl_module.device)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Exit with 143 after SIGTERM."""
        set_sigterm_status(trainer, exception)
