"""Throughput of a training run: tokens per second, model FLOPs utilisation, data wait and memory."""

from __future__ import annotations

import functools
import math
import resource
import sys
import time
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import Callback

from lit_gpt.batch import Batch
from lit_gpt.console.messages import note
from lit_gpt.train.lightning_fixes import log_scalars
from lit_gpt.train.module import LitGPT

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit matrix products per second by part of the device's name, from the vendors' data sheets. The first match
counts. Sparse figures, twice as large, are reached by no training run."""

_MEASURING_SECONDS = 0.05
"""For the products that measure an unknown device: long ones, of a slow device, need no repetition."""


class Throughput(Callback):
    """Tokens seen, tokens per second, model FLOPs utilisation, data wait and memory, at each entry of the log.

    Nothing waits for the device between entries; validation and checkpoints do not count as training time.

    Attributes:
        tokens: target tokens trained on, over all ranks and resumed runs.
        flops: floating-point operations of forward and backward passes, likewise; NaN where an earlier part of the run
            did not count them.
        peak: FLOP/s of all devices together that utilisation is measured against.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.flops = 0.0
        self.peak = math.nan
        self._logged_tokens = 0
        self._busy = 0.0  # seconds of training since the last entry
        self._waited = 0.0  # of these, seconds between batches
        self._mark: float | None = None  # when the last batch ended; None where other work came between
        self._start = 0.0
        self._began: float | None = None  # this part of the run
        self._seconds_before = 0.0  # of earlier parts

    def state_dict(self) -> dict[str, Any]:
        """The sums, so that a resumed run goes on counting."""
        return {"tokens": self.tokens, "flops": self.flops, "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self.tokens = self._logged_tokens = state_dict["tokens"]
        self.flops = state_dict.get("flops", math.nan)
        self._seconds_before, self._began = state_dict.get("seconds", math.nan), None

    @property
    def seconds(self) -> float:
        """Seconds of training so far, validations, samples and checkpoints included, over all parts of the run."""
        return self._seconds_before + (0.0 if self._began is None else time.perf_counter() - self._began)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find or measure the device's peak."""
        self.peak = peak_flops(trainer.strategy.root_device, str(trainer.precision)) * trainer.world_size

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The clock of this run starts."""
        self._began = time.perf_counter()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        """The time since the last batch ended was spent on fetching this one."""
        self._start = time.perf_counter()
        if self._mark is not None:
            self._waited += self._start - self._mark
            self._busy += self._start - self._mark

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        """Count, and at each entry of the log report."""
        assert isinstance(pl_module, LitGPT)
        counted = batch[1].numel() * trainer.world_size
        self.tokens += counted
        self.flops += counted * _training_flops_per_token(pl_module, batch[1].size(1))
        if pl_module.logs_now:
            if trainer.strategy.root_device.type == "cuda":
                torch.cuda.synchronize(trainer.strategy.root_device)
            self._busy += time.perf_counter() - self._start
            log_scalars(pl_module, self._figures(pl_module, batch[1].size(1)))
            self._logged_tokens, self._busy, self._waited = self.tokens, 0.0, 0.0
        else:
            self._busy += time.perf_counter() - self._start
        self._mark = time.perf_counter()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What follows is not waiting for data."""
        self._mark = None

    def _figures(self, module: LitGPT, context: int) -> dict[str, float]:
        rate = (self.tokens - self._logged_tokens) / self._busy
        flops = _training_flops_per_token(module, context) * rate
        return {
            "speed/tokens": self.tokens,
            "speed/tokens_per_second": rate,
            "speed/mfu": flops / self.peak,
            "speed/data_wait": self._waited / self._busy,
            "speed/peak_memory_gib": peak_memory(module.device) / 2**30,
        }

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """One line about the whole run, compilation, validation and checkpoints included."""
        if trainer.is_global_zero:
            memory = peak_memory(trainer.strategy.root_device) / 2**30
            seconds = time.perf_counter() - (self._began or 0.0)
            done = f"{trainer.global_step:,} steps, {self.tokens:,} tokens in {seconds:.1f} s"
            note(f"{done}, peak memory {memory:.2f} GiB")


def _training_flops_per_token(module: LitGPT, context: int) -> float:
    """Of the forward and the backward pass, at a context of so many tokens."""
    passes = 3 if module.adapter is None else 2  # a frozen weight has no gradient
    return passes * module.config.forward_flops_per_token(context)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has had allocated on the GPU, or resident in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(device: torch.device, precision: str) -> float:
    """FLOP/s that large matrix products reach on `device` in `precision`: known for common GPUs, else measured."""
    half = not precision.startswith(("32", "64"))
    if device.type == "cuda" and half:
        name = torch.cuda.get_device_name(device)
        for part, known in PEAK_FLOPS.items():
            if part in name:
                return known
    dtype = torch.float32 if not half else torch.float16 if precision.startswith("16") else torch.bfloat16
    return _measured_flops(device, dtype, torch.get_num_threads())


@functools.cache
def _measured_flops(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    """FLOP/s of the fastest of ten products, or of fewer where they are slow: once in a process, since it takes time.

    One core is at its peak with a smaller product than many are.
    """
    size = 8192 if device.type != "cpu" else 512 if threads <= 4 else 1024
    a = torch.ones(size, size, dtype=dtype, device=device)
    seconds: list[float] = []
    while len(seconds) < 2 or (len(seconds) < 10 and sum(seconds) < _MEASURING_SECONDS):
        start = time.perf_counter()
        product = a @ a
        product[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
