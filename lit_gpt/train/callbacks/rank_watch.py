"""A run of several processes that ends on all of them when it fails on one, and saves what rank 0 can save alone."""

from __future__ import annotations

import atexit
import os
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_gpt.batch import Batch
from lit_gpt.train.rank_children import watch_children
from lit_gpt.train.rank_monitor import RankMonitor, exit_in_bounded_time, is_lost_connection
from lit_gpt.train.rank_zero import current_monitor, one_line
from lit_gpt.train.ranks import Ranks

_UNTIMED_BATCHES = 2  # the first ones may compile


class RankWatch(Callback):
    """Marks the progress of this rank, and keeps an exception of one rank from entering collectives."""

    def __init__(self) -> None:
        self._monitor: RankMonitor | None = None
        self._uses = 0
        self._is_own = False  # whether the monitor ends with this fit
        self._batches = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Watch the ranks of this run."""
        if trainer.world_size == 1 or self._monitor is not None or "MASTER_PORT" not in os.environ:
            return
        self._monitor, self._batches = current_monitor(), 0
        if self._monitor is None:
            self._uses, self._is_own = self._uses + 1, True
            rank = trainer.global_rank
            agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            monitor = RankMonitor(Ranks(rank, trainer.world_size, address, port, rank == 0 and not agent), self._uses)
            self._monitor = monitor.start()
            watch_children(lambda index, end: monitor.declare(rank + index + 1, f"rank {rank + index + 1} {end}"))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """This rank has come to the end of the fit."""
        self._mark("the end", False)
        if self._monitor is not None and self._is_own:
            self._monitor.stop()
        self._monitor = None

    # Progress --------------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """A batch has come."""
        self._batches += 1
        self._mark(f"the forward pass of batch {batch_idx}", self._batches > _UNTIMED_BATCHES)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        """From here on this rank waits for the others."""
        self._mark("the backward pass", self._batches > _UNTIMED_BATCHES)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """The next batch is to come."""
        self._mark(f"waiting for the batch after {batch_idx}", self._batches > _UNTIMED_BATCHES)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Loaders and compilation have no limit."""
        self._mark("the start of the validation", False)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A batch of the validation has come."""
        self._mark(f"batch {batch_idx} of the validation", batch_idx > _UNTIMED_BATCHES)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What follows are samples and checkpoints."""
        self._mark("the end of the validation", False)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Writing has no limit."""
        self._mark("writing a checkpoint", False)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """New loaders may follow."""
        self._mark("the end of an epoch", False)

    def _mark(self, text: str, is_limited: bool) -> None:
        if self._monitor is not None:
            self._monitor.mark(text, is_limited)

    # Failure ---------------------------------------------------------------------------------------------------------

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """From here on this rank communicates no more. Rank 0 of DDP has all that a checkpoint needs, and saves it."""
        monitor = self._monitor
        if monitor is None or isinstance(exception, SIGTERMException):  # on which all ranks agreed, after the same step
            return
        monitor.begin_ending()
        if is_lost_connection(exception):
            cause = monitor.wait_for_cause(5) or "the connection to another rank was lost"
            exception.args = (f"{cause}; rank {monitor.rank} ends. To go on: --ckpt_path last",)
            monitor.fail(cause)
        else:
            monitor.fail(f"rank {monitor.rank} failed: {type(exception).__name__}: {one_line(exception)}")
        leave_group(trainer.strategy)
        if not (trainer.is_global_zero and isinstance(trainer.strategy, DDPStrategy)):
            for callback in trainer.checkpoint_callbacks:
                callback.save_on_exception = False  # type: ignore[attr-defined]
        atexit.register(exit_in_bounded_time)


def leave_group(strategy: Strategy) -> None:
    """Make the strategy's collectives local: the other ranks are not in them, and this one would wait for ever."""
    strategy.barrier = lambda *_, **__: None  # type: ignore[method-assign]
    strategy.broadcast = lambda obj, src=0: obj  # type: ignore[method-assign]
    strategy.reduce = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    strategy.reduce_boolean_decision = lambda decision, all=True: decision  # type: ignore[method-assign]
