"""A program for the resume tests: fits, one after the other, as its argument says. Each rank logs the samples it saw.

`python resume_driver.py '[{"folder": …, "root": …, …}, …]'`; the keys are `fit`'s parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.checkpoint.lightning_io import AtomicCheckpointIO
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.model.config import GPTConfig
from lit_gpt.train.callbacks.reference import ReferenceLogprobs
from lit_gpt.train.module import LitGPT

CONFIG = GPTConfig(vocab_size=257, block_size=16, n_layer=1, n_head=2, n_embd=16, dropout=0.2)


class Recorder(Callback):
    """Writes each micro-batch's step and samples; saves in the middle of a step; waits to be killed."""

    def __init__(self, root: Path, save_at_batch: int | None, wait_at_step: int | None) -> None:
        self.root, self.save_at_batch, self.wait_at_step = root, save_at_batch, wait_at_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        rows = [hashlib.sha256(str(row.tolist()).encode()).hexdigest()[:16] for row in batch[0]]
        with open(self.root / f"samples_{trainer.global_rank}.jsonl", "a") as file:
            file.write(json.dumps([trainer.global_step, rows]) + "\n")
        if trainer.global_step == self.wait_at_step:
            time.sleep(600)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            trainer.save_checkpoint(self.root / f"step{trainer.global_step}.ckpt")
        elif trainer.fit_loop.total_batch_idx == self.save_at_batch:
            trainer.save_checkpoint(self.root / "middle.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.root / f"validated{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trainer.save_checkpoint(self.root / f"epoch{trainer.global_step}.ckpt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            torch.save(pl_module.state_dict(), self.root / "weights.pt")


def fit(
    folder: str,
    root: str,
    ckpt_path: str | None = None,
    ranks: int = 1,
    accumulate: int = 2,
    batch_size: int = 4,
    save_at_batch: int | None = None,
    wait_at_step: int | None = None,
    data: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> None:
    """One fit, with a checkpoint after each optimizer step; `data` and `config` are options beside the usual ones."""
    path = Path(root)
    path.mkdir()
    L.seed_everything(5, verbose=False)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="auto" if ranks == 1 else "ddp_fork_find_unused_parameters_true",
        logger=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=accumulate,
        callbacks=[Recorder(path, save_at_batch, wait_at_step)],
        enable_checkpointing=False,
        plugins=[AtomicCheckpointIO()] if ranks == 1 else None,  # forked ranks hand back bare weights in a file
        **options,
    )
    shape = dataclasses.replace(CONFIG, **(config or {}))
    tokens = TokenDataModule(folder, batch_size=batch_size, block_size=shape.block_size, **(data or {}))
    if tokens.format == "pairs":
        trainer.callbacks.append(ReferenceLogprobs(tokens))  # type: ignore[attr-defined]
    trainer.fit(LitGPT(shape), tokens, ckpt_path=ckpt_path)


if __name__ == "__main__":
    for parameters in json.loads(sys.argv[1]):
        fit(**parameters)
