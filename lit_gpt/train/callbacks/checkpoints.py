"""The two checkpoints of a run: the best by validation loss, and the last."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_gpt.errors import UserError
from lit_gpt.files.locks import Lock
from lit_gpt.train import run_folder


class RunCheckpoint(ModelCheckpoint):
    """A checkpoint under one name, written over whole by `AtomicCheckpointIO`: there is no moment without a good file.

    Nothing is saved on an exception before training has begun: a resume that fails half-way, with the loops restored
    and the optimizer not, would replace the good file that it was to go on from. Nor is a half-made update.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(enable_version_counter=False, **options)
        self._has_begun = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Nothing has begun."""
        super().setup(trainer, pl_module, stage)
        self._has_begun = False

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the best score where the run goes on in its folder, but names it otherwise, as from another directory.

        Lightning compares names: it would forget the score, so that the first validation, however bad, would be the
        best; and it would remove the file, as an older one, under its old name.
        """
        state = checkpoint.get("callbacks", {}).get(self.state_key)
        here = str(self.dirpath)
        if state is None or not _is_same(Path(str(trainer.ckpt_path)).parent, Path(here)):
            return
        state["dirpath"] = self.dirpath
        state["best_k_models"] = {_moved(path, here): score for path, score in state["best_k_models"].items()}
        for name in ("best_model_path", "kth_best_model_path", "last_model_path"):
            state[name] = _moved(state[name], here)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All is restored. What was resumed from is saved already, but for what the validation after it would save."""
        super().on_train_start(trainer, pl_module)
        self._has_begun = True
        if not getattr(pl_module, "repeats_validation", False):
            self._last_global_step_saved = trainer.global_step

    def _should_save_on_exception(self, trainer: L.Trainer) -> bool:
        return self._has_begun and not _is_updating(trainer) and super()._should_save_on_exception(trainer)


def _is_updating(trainer: L.Trainer) -> bool:
    """Whether the exception came in the middle of an optimizer step, with some weights moved and others not."""
    steps = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    return getattr(trainer.lightning_module, "stepped", False) and steps.ready > steps.completed


def _is_same(one: Path, other: Path) -> bool:
    return one.is_dir() and other.is_dir() and one.samefile(other)


def _moved(path: str, folder: str) -> str:
    """The file of that name in `folder`, letter by letter as Lightning will name it; "" for none."""
    return os.path.join(folder, os.path.basename(path)) if path else path


class BestCheckpoint(RunCheckpoint):
    """`best.ckpt`: the weights with the lowest `val/loss` so far."""

    def __init__(self) -> None:
        super().__init__(filename="best", monitor="val/loss", mode="min")

    @property
    def state_key(self) -> str:
        """The key of its state in a checkpoint, the one of `ModelCheckpoint`: runs that were made by that go on."""
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__, 1)


class LastCheckpoint(RunCheckpoint):
    """`last.ckpt`: the state after each validation, at the end, and when a run is interrupted.

    Attributes:
        lock: on the run's folder, if who started the run holds it, which only rank 0 can. Else it is acquired here.
    """

    def __init__(self) -> None:
        super().__init__(filename="last", save_on_exception=True)
        self.lock: Lock | None = None
        self._own_lock: Lock | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Lock the run's folder.

        Raises:
            UserError: on all ranks, if another run writes to it.
        """
        super().setup(trainer, pl_module, stage)
        refusal = ""
        if stage == "fit" and trainer.is_global_zero and self.lock is None:
            try:
                self._own_lock = run_folder.lock(self._run_folder())
            except UserError as error:
                refusal = str(error)
        if refusal := trainer.strategy.broadcast(refusal):
            raise UserError(refusal)

    def _run_folder(self) -> Path:
        checkpoints = Path(str(self.dirpath))
        folder = checkpoints.parent if checkpoints.name == run_folder.CHECKPOINTS else checkpoints
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what came after the last validation."""
        if not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Free the folder."""
        self._release()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save what was made since the last validation, if training had begun, and free the folder."""
        try:
            super().on_exception(trainer, pl_module, exception)
        finally:
            self._release()

    def _release(self) -> None:
        if self._own_lock is not None:
            self._own_lock.release(remove=True)
            self._own_lock = None
