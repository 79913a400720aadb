"""Writing of a run's log, `run.jsonl`, which comparisons, sweeps and whoever watches a run read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.checkpoint.provenance import code_version, environment
from lit_gpt.checkpoint.run_log import append_event
from lit_gpt.data.datamodule import TokenDataModule
from lit_gpt.data.loader import EvalLoader
from lit_gpt.train.callbacks.throughput import Throughput, peak_memory
from lit_gpt.train.module import LitGPT


class RunLogWriter(Callback):
    """Logs a run's start, each of its validations with what had been spent by then, and its end.

    Nothing is written before the first batch is done: a resume that fails before it leaves the log of its run as it
    was. A run without a logger has no folder, and none is made for the log.
    """

    def __init__(self, throughput: Throughput) -> None:
        """A writer that reads time, tokens and FLOPs from `throughput`, another callback of the run."""
        self._throughput = throughput
        self._folder: Path | None = None  # on rank 0
        self._start: Mapping[str, Any] | None = None  # not written yet

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The run starts, or goes on: all is restored."""
        assert isinstance(pl_module, LitGPT)
        self._folder = None
        if not trainer.loggers or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        folder = trainer.log_dir  # on all ranks, because that communicates
        if trainer.is_global_zero and folder:
            self._folder, self._start = Path(folder), {"step": trainer.global_step, **_about(trainer, pl_module)}

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        """After the first batch the start is a fact."""
        if self._start is not None:
            self._write_start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The figures of a validation, before the checkpoints that it leads to are written."""
        assert isinstance(pl_module, LitGPT)
        if not trainer.sanity_checking and pl_module.validation is not None:
            self._append("validation", {**pl_module.validation, **self._spent(trainer)})

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The run has come to its end, and all its files are written. No run that an exception ended comes here."""
        self._append("end", self._spent(trainer))
        self._folder = None

    def _append(self, event: str, values: Mapping[str, Any]) -> None:
        if self._folder is not None:
            self._write_start()
            append_event(self._folder, event, values)

    def _write_start(self) -> None:
        if self._folder is not None and self._start is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            append_event(self._folder, "start", self._start)
        self._start = None

    def _spent(self, trainer: L.Trainer) -> dict[str, Any]:
        return {
            "step": trainer.global_step,
            "seconds": round(self._throughput.seconds, 3),
            "tokens": self._throughput.tokens,
            "flops": self._throughput.flops,
            "peak_memory": peak_memory(trainer.strategy.root_device),
        }


def _about(trainer: L.Trainer, module: LitGPT) -> dict[str, Any]:
    """What does not change while the run goes on; of data that is none of ours nothing is known."""
    data, held_out = getattr(trainer, "datamodule", None), trainer.val_dataloaders
    device = trainer.strategy.root_device
    return {
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "tokenizer": None if module.tokenizer is None else module.tokenizer.hash,
        "train_sha256": data.state_dict().get("fingerprint") if isinstance(data, TokenDataModule) else None,
        "val_sha256": held_out.fingerprint if isinstance(held_out, EvalLoader) else None,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": trainer.world_size,
        "code": code_version(),
        "environment": environment(),
    }
