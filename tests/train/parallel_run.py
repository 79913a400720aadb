"""A training run for the tests of several processes: `python parallel_run.py FOLDER '{"devices": 2, …}'`.

Lightning's launch starts the other ranks by the Python `$LIT_GPT_TEST_PYTHON`, if it is set.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from training import Batches, module, trainer

from lit_gpt.tokenizer.tokenizer import get_tokenizer
from lit_gpt.train.budget import Budget, budget_of
from lit_gpt.train.callbacks.defaults import default_callbacks
from lit_gpt.train.optim import OptimizerConfig
from lit_gpt.train.schedule import ScheduleConfig


class Terminate(Callback):
    """Sends SIGTERM to its own process after some steps, as a scheduler would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step and trainer.is_global_zero:
            os.kill(os.getpid(), signal.SIGTERM)


class SkewedRates(Callback):
    """Makes the clock of rank 1's budget run ahead by `skew` seconds a step, and records what each rank makes of it."""

    def __init__(self, folder: Path, skew: float) -> None:
        self.folder, self.skew = folder, skew
        self.rates: list[tuple[float, float]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            budget_of(trainer)._offset += self.skew  # type: ignore[union-attr]

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rates.append((budget_of(trainer).share, trainer.optimizers[0].param_groups[0]["lr"]))  # type: ignore

    def on_train_end(self, trainer: L.Trainer, *_: Any) -> None:
        (self.folder / f"rates_{trainer.global_rank}.json").write_text(json.dumps(self.rates))


def main(folder: Path, asked: dict[str, Any]) -> None:
    options: dict[str, Any] = {
        "max_steps": 6,
        "gradient_clip_val": 0.3,
        "enable_checkpointing": True,
        "enable_progress_bar": True,
    }
    options["callbacks"] = [*([Terminate(asked["sigterm"])] if "sigterm" in asked else []), *default_callbacks()]
    if "budget" in asked:
        options["callbacks"] += [Budget(timedelta(seconds=asked["budget"])), SkewedRates(folder, asked["skew"])]
    if asked.get("strategy") == "fsdp2":
        options["strategy"] = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
    elif "strategy" in asked:
        options["strategy"] = asked["strategy"]
    run = trainer(
        folder, **options | {key: asked[key] for key in ("devices", "precision", "max_steps") if key in asked}
    )
    lit = module(
        optimizer=OptimizerConfig(name=asked.get("optimizer", "adamw"), lr=1e-2, muon_beta2=0.95),
        schedule=ScheduleConfig(warmup=0, name=asked.get("schedule", "constant")),
    )
    lit.tokenizer = get_tokenizer("byte")
    run.fit(lit, Batches(24, 4), Batches(13, 4, seed=1), ckpt_path=asked.get("ckpt_path"))
    if run.is_global_zero:
        figures = {name: float(value) for name, value in run.callback_metrics.items()}
        (folder / "figures.json").write_text(json.dumps({"log_dir": run.logger.log_dir, **figures}))  # type: ignore


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.executable = os.environ.get("LIT_GPT_TEST_PYTHON", sys.executable)
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
