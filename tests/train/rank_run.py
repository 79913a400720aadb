"""A DDP run one of whose ranks fails: `python rank_run.py '{"root": …, "data": …, "fault": "kill", "rank": 1}'`."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from training import TINY

from lit_gpt.checkpoint.lightning_io import AtomicCheckpointIO
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.train.callbacks.defaults import default_callbacks
from lit_gpt.train.module import LitGPT

FAULTS = {
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "hang": lambda: time.sleep(600),
}


class Fault(Callback):
    """Fails on one rank at one step, or pauses after a validation."""

    def __init__(self, kind: str, rank: int, step: int) -> None:
        self.kind, self.rank, self.step = kind, rank, step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, index: int) -> None:
        if (trainer.global_rank, trainer.global_step) != (self.rank, self.step) or self.kind not in ("raise", *FAULTS):
            return
        if self.kind == "raise":
            raise ValueError("a batch that cannot be read")
        FAULTS[self.kind]()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.kind == "slow validation" and trainer.global_rank == self.rank and trainer.global_step == self.step:
            time.sleep(15)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), Path(trainer.default_root_dir) / "weights.pt")


def main(
    root: str,
    data: str,
    fault: str = "",
    rank: int = 0,
    step: int = 5,
    devices: int = 2,
    nodes: int = 1,
    ckpt_path: str | None = None,
) -> None:
    L.seed_everything(5, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=DDPStrategy(find_unused_parameters=True),  # buckets that are not rebuilt: the same bits after a resume
        max_steps=8,
        val_check_interval=3,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        default_root_dir=root,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[Fault(fault, rank, step), *default_callbacks()],
        plugins=[AtomicCheckpointIO()],
    )
    trainer.fit(LitGPT(TINY), TokenDataModule(data, batch_size=4, block_size=16), ckpt_path=ckpt_path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(**json.loads(sys.argv[1]))
