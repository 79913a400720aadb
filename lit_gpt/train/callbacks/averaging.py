"""The average of a run's weights: what is validated, saved and generates, while training goes on with the latest."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lit_gpt.errors import UserError


class PolynomialAveraging(WeightAveraging):
    """Lightning's `WeightAveraging`, where step t counts as about t^power: a moving average of t / (power + 1) steps.

    Polynomial-decay averaging (Shamir and Zhang 2013, arXiv 1212.1824, section 4). An exponential moving average needs
    a length that suits the number of steps; this one grows with them, and forgets the first weights by itself.
    """

    def __init__(self, power: float = 2.0) -> None:
        """Nothing is averaged yet.

        Args:
            power: 0 for the plain mean of all steps; the larger, the later the steps that count.

        Raises:
            UserError: it is negative.
        """
        if not power >= 0:
            raise UserError(f"power={power} of the averaging of weights is negative: give 0 or more")
        super().__init__(use_buffers=False, multi_avg_fn=self._move)
        self.power = power
        self._is_swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Before `fit`, copy the weights. Raises UserError where a process has a part of them, or most are frozen."""
        if stage != "fit":
            return
        remedy = "leave PolynomialAveraging out of trainer.callbacks (--trainer.callbacks null)"
        if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
            raise UserError(
                f"averaging of weights needs all of them in each process, which {type(trainer.strategy).__name__} does "
                f"not keep: use --trainer.strategy ddp, or {remedy}"
            )
        if getattr(pl_module, "adapter", None) is not None:
            raise UserError(f"averaging is of a whole model's weights, not of an adapter's: {remedy}")
        self._is_swapped = False
        self._device = trainer.strategy.root_device
        with trainer.strategy.tensor_init_context(), trainer.precision_plugin.module_init_context():
            pl_module.configure_model()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*overrides the configure_model")  # it concerns sharding alone
            super().setup(trainer, pl_module, stage)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate the averages."""
        if trainer.state.fn == TrainerFn.FITTING and not self._is_swapped:
            self._swap_models(pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on with the latest weights."""
        if trainer.state.fn == TrainerFn.FITTING and self._is_swapped:
            self._swap_models(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averages in the model; a checkpoint that is saved now has the latest weights too."""
        if not self._is_swapped:
            self._swap_models(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """`state_dict` are the averages, `current_model_state` the latest weights, also if a validation was stopped."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        if self._is_swapped and "current_model_state" in checkpoint:
            names = "state_dict", "current_model_state"
            checkpoint.update(zip(names, [checkpoint[name] for name in reversed(names)]))

    def _swap_models(self, pl_module: LightningModule) -> None:
        super()._swap_models(pl_module)
        self._is_swapped = not self._is_swapped

    def _move(self, averages: Sequence[Tensor], weights: Sequence[Tensor], averaged: Tensor | int) -> Any:
        """Bring the averages of `averaged` steps up to the next one, whose weights are given."""
        torch._foreach_lerp_(list(averages), list(weights), (self.power + 1) / (self.power + 1 + float(averaged)))
