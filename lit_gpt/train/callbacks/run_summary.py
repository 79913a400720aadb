"""A run's summary: its size and TensorBoard's address at the start, its final figures at the end."""

from __future__ import annotations

import lightning.pytorch as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from lit_gpt.console.messages import note
from lit_gpt.train.callbacks.run_paths import log_root, path_from_here


class RunSummary(Callback):
    """Prints model size and TensorBoard command when a run starts, and logs hyperparameters with its final figures."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Say how large the model is and how to open TensorBoard; put train and validation loss on one chart."""
        if trainer.is_global_zero:
            parameters = list(pl_module.parameters())
            trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
            is_whole = all(parameter.requires_grad for parameter in parameters)
            note(f"model: {trained:,} " + ("parameters" if is_whole else "trained parameters over a frozen base"))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                chart = {"loss": {"train and val": ["Multiline", ["train/loss", "val/loss"]]}}
                logger.experiment.add_custom_scalars(chart)
                folder = path_from_here(log_root(trainer))
                note(f"curves: tensorboard --logdir {folder}, then open http://localhost:6006 (run {logger.version})")

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the hyperparameters with the final figures, TensorBoard's table of runs."""
        figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger) and figures:
                final = {f"final/{name.removeprefix('val/')}": value for name, value in figures.items()}
                logger.log_hyperparams(dict(pl_module.hparams), final)
