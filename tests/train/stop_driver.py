"""A run that receives signals, for the tests: `python stop_driver.py FOLDER '{"where": "validation", …}'`.

The keys: `where` the signals come (`train`, `validation`), the `signals` in order, the `rank` that receives them, the
`step` in whose validation they come, `devices`, `ckpt_path`, `limits` of the Trainer, a folder for checkpoints `into`
which the run is resumed, `rows` of validation.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from training import TINY, Batches, module, trainer

from lit_gpt.train.callbacks.defaults import default_callbacks


class Signals(Callback):
    """Sends signals to its own process in the eighth step, or in the second batch of a validation."""

    def __init__(self, folder: Path, where: str, signals: list[int], rank: int, step: int) -> None:
        self.folder, self.where, self.signals, self.rank, self.step = folder, where, signals, rank, step

    def send(self, trainer: L.Trainer) -> None:
        if trainer.global_rank == self.rank:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.where == "train" and trainer.global_step == 7:
            self.send(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, batch_idx: int, *_: Any) -> None:
        with open(self.folder / f"validated_{trainer.global_rank}.txt", "a") as file:
            file.write(f"{trainer.global_step} {batch_idx}\n")
        if self.where == "validation" and trainer.global_step == self.step and batch_idx == 1:
            self.send(trainer)


def main(folder: Path, where: str = "", signals: list[int] = [], rank: int = 0, **asked: Any) -> None:  # noqa: B006
    folder.mkdir(exist_ok=True)
    run = trainer(
        folder,
        devices=asked.get("devices", 1),
        strategy="ddp" if "devices" in asked else "auto",
        enable_checkpointing=True,
        enable_progress_bar=True,
        callbacks=[
            Signals(folder, where, signals, rank, asked.get("step", 12)),
            *default_callbacks(),
        ],
        **asked.get("limits", {"max_epochs": 3}),
    )
    for callback in run.checkpoint_callbacks if "into" in asked else ():
        callback.dirpath = str(asked["into"])  # type: ignore[attr-defined]
    rows = asked.get("rows", 32)
    data = Batches(24, 4), Batches(rows, 4, seed=1) if rows else []
    run.fit(module(config=replace(TINY, n_layer=1)), *data, ckpt_path=asked.get("ckpt_path"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), **json.loads(sys.argv[2]))
