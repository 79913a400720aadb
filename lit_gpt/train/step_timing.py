"""Timing of a training step on the CPU, with a throw-away model of the run's own shapes.

What the hardware does not decide is timed: on one and the same CPU bf16 autocast won or lost by factors, depending on
the shapes and on which kernels PyTorch has for them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

MARGIN = 1.05
"""What is not the default must be this many times faster to be chosen: at a tie fp32 is safer, and eager simpler."""

_PROBE_SECONDS = 2.0
_PROBE_FLOPS = 5e11  # of a timed step: a few seconds for a CPU
_STEPS = 5


@dataclass(frozen=True)
class StepTiming:
    """What one training step (forward and backward pass) took.

    Attributes:
        precision: by the Trainer's name.
        seconds: of the fastest step.
        tokens: target tokens of the step.
        rows: rows of the step's batch.
    """

    precision: str
    seconds: float
    tokens: int
    rows: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens in one second."""
        return self.tokens / self.seconds


def time_precisions(
    config: GPTConfig, batch_size: int, block_size: int, activation_checkpointing: bool = False
) -> tuple[StepTiming, StepTiming]:
    """Time a training step in `32-true` and in `bf16-mixed`.

    The optimizer is left out: it works on the same fp32 weights in both. Rows of the batch are dropped where a step
    would take long: the products are large enough then for time to be proportional to the rows.
    """
    row_flops = 3 * block_size * config.forward_flops_per_token(block_size)
    rows = min(batch_size, max(1, int(_PROBE_FLOPS / row_flops)))
    best = {"32-true": float("inf"), "bf16-mixed": float("inf")}
    with _throwaway_model(config, rows, block_size, activation_checkpointing) as (model, idx):
        until = time.perf_counter() + _PROBE_SECONDS
        while True:  # in turn, and the fastest of each: neither warm-up nor a busy machine decides
            for precision in best:
                best[precision] = min(best[precision], _step_seconds(model, idx, precision))
            if time.perf_counter() > until:
                break
    full, mixed = (StepTiming(precision, seconds, idx.numel(), rows) for precision, seconds in best.items())
    return full, mixed


def time_steps(
    config: GPTConfig, precision: str, rows: int, activation_checkpointing: bool, compile: bool = False
) -> StepTiming:
    """The fastest of a few steps on `rows` full contexts, with the model's blocks compiled or not."""
    with _throwaway_model(config, rows, config.block_size, activation_checkpointing) as (model, idx):
        for block in model.h if compile else ():
            block.compile()
        seconds = min(_step_seconds(model, idx, precision) for _ in range(_STEPS))
    return StepTiming(precision, seconds, idx.numel(), rows)


@contextmanager
def _throwaway_model(
    config: GPTConfig, rows: int, block_size: int, activation_checkpointing: bool
) -> Iterator[tuple[GPT, Tensor]]:
    """A random model in training mode and random tokens (rows, block_size). Keeps the random state outside."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = GPT(config).train()
        model.activation_checkpointing = activation_checkpointing
        yield model, torch.randint(config.vocab_size, (rows, block_size))


def _step_seconds(model: GPT, idx: Tensor, precision: str) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        output = model(idx, idx)
    (output.loss_sum / output.n_targets).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start
