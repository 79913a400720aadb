"""What the tests of training share: data without a loader's help, and a Trainer without noise."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.checkpoint.lightning_io import AtomicCheckpointIO
from lit_gpt.model.config import GPTConfig
from lit_gpt.train.module import LitGPT

TINY = GPTConfig(vocab_size=61, block_size=16, n_layer=2, n_head=2, n_embd=32)


class Batches:
    """Rows of random tokens in batches; under several ranks each gets its share of every batch.

    The last batch is filled up with targets that do not count, so that every rank has the same number of batches.
    """

    def __init__(self, rows: int, batch: int, seed: int = 0, vocab: int = 61) -> None:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(vocab, (rows, 17), generator=generator)
        tokens[:, 1::2] = tokens[:, ::2][:, :8]  # half of it can be learnt: every second token repeats
        short = -rows % batch
        idx, targets = tokens[:, :-1], tokens[:, 1:]
        self.idx = torch.cat([idx, idx.new_zeros(short, 16)]).split(batch)
        self.targets = torch.cat([targets, targets.new_full((short, 16), IGNORE_INDEX)]).split(batch)

    def __len__(self) -> int:
        return len(self.idx)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rank, world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        for idx, targets in zip(self.idx, self.targets):
            yield idx[rank::world].contiguous(), targets[rank::world].contiguous()


def trainer(folder: Path, **options: Any) -> L.Trainer:
    """A Trainer that logs every step to CSV and says nothing."""
    return L.Trainer(**{
        "accelerator": "cpu",
        "devices": 1,
        "logger": CSVLogger(folder, flush_logs_every_n_steps=1),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "plugins": [AtomicCheckpointIO()],
        **options,
    })  # fmt: skip


def losses(run: L.Trainer, column: str = "train/loss") -> dict[int, float]:
    """Step → value, read back from what the run has written."""
    import csv

    with open(Path(run.logger.log_dir) / "metrics.csv") as file:  # type: ignore[union-attr,arg-type]
        return {int(row["step"]): float(row[column]) for row in csv.DictReader(file) if row.get(column)}


def module(seed: int = 5, **options: Any) -> LitGPT:
    """A tiny module; the seed decides its weights and its dropout."""
    L.seed_everything(seed, verbose=False)
    return LitGPT(**{"config": TINY, **options})
