"""Progress of a rank, for the others that wait for it; and an end that enters no collective, where one has failed."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lit_gpt.data.remote import is_remote
from lit_gpt.train.rank_watch import RankWatch
from lit_gpt.train.rank_zero import current_watch

_UNTIMED_BATCHES = 2  # the first ones may compile


class RankProgress(Callback):
    """Marks the progress of this rank, and keeps an exception of one rank from entering collectives."""

    def __init__(self) -> None:
        self._watch: RankWatch | None = None
        self._batches = 0
        self._downloads = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing is watched in a run of one process, or of another program than ours."""
        self._watch, self._batches = current_watch(), 0
        path = getattr(trainer.datamodule, "path", None)  # type: ignore[attr-defined]
        self._downloads = path is not None and is_remote(path)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """A batch has come, after which this rank will wait for the others."""
        self._batches += 1
        self._mark(trainer, self._batches > _UNTIMED_BATCHES)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """A batch of the validation has come."""
        self._mark(trainer, batch_idx > _UNTIMED_BATCHES)

    def on_before_backward(self, trainer: L.Trainer, *_: Any) -> None:
        """From here on this rank waits for the others."""
        self._mark(trainer, self._batches > _UNTIMED_BATCHES)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """The next batch is to come; a shard that is fetched for it has time-outs of its own."""
        self._mark(trainer, self._batches > _UNTIMED_BATCHES and not self._downloads)

    def _between_batches(self, trainer: L.Trainer, *_: Any, **__: Any) -> None:
        """Writing, generating samples and starting loaders have no limit."""
        self._mark(trainer, False)

    on_validation_start = on_validation_epoch_end = on_save_checkpoint = _between_batches
    on_train_epoch_end = on_train_end = teardown = _between_batches

    def _mark(self, trainer: L.Trainer, is_limited: bool) -> None:
        if self._watch is not None:
            self._watch.mark(f"after step {trainer.global_step}", is_limited)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """From here on this rank communicates no more. Rank 0 of DDP has all that a checkpoint needs, and saves it."""
        if isinstance(exception, SIGTERMException):  # on which all ranks agreed, after the same step
            if self._watch is not None:
                self._watch.begin_ending()
            return
        if self._watch is not None:
            self._watch.report(exception)
        if trainer.world_size > 1:
            leave_group(trainer.strategy)
            if not (trainer.is_global_zero and isinstance(trainer.strategy, DDPStrategy)):
                for callback in trainer.checkpoint_callbacks:
                    callback.save_on_exception = False  # type: ignore[attr-defined]


def leave_group(strategy: Strategy) -> None:
    """Make the strategy's collectives local: the other ranks are not in them, and this one would wait for ever."""
    strategy.barrier = lambda *_, **__: None  # type: ignore[method-assign]
    strategy.broadcast = lambda obj, src=0: obj  # type: ignore[method-assign]
    strategy.reduce = lambda tensor, *_, **__: tensor  # type: ignore[method-assign]
    strategy.reduce_boolean_decision = lambda decision, all=True: decision  # type: ignore[method-assign]
