"""Whether `torch.compile` makes a training run faster by more than it costs."""

from __future__ import annotations

import math
import os
import shutil
import sysconfig
from pathlib import Path

from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT
from lit_gpt.train.precision import device_type
from lit_gpt.train.step_timing import MARGIN, StepTiming, time_steps

_MIN_RUN_SECONDS = 300.0  # a run must last this long for half a minute of trying it out
_SLOW_CPU_FLOPS = 2e10  # FLOP/s that every CPU reaches


def resolve_compile(
    config: GPTConfig,
    precision: str,
    batch_size: int,
    run_tokens: int,
    eager: StepTiming | None = None,
    accelerator: str = "auto",
    activation_checkpointing: bool = False,
    max_seconds: float = math.inf,
) -> tuple[bool, str]:
    """Whether `torch.compile` earns its time back in a training run, and the timing that says so, "" if there is none.

    On a GPU it does. On a CPU it is timed, where the run is long enough for that: it was seen to make steps of 0.8M
    parameters a fifth faster and steps of 124M parameters a quarter slower.

    Args:
        config: the model.
        precision: by the Trainer's name.
        batch_size: rows of one micro-batch.
        run_tokens: tokens of the whole run; 0 if unknown.
        eager: a step without it, if `resolve_precision` has timed one.
        accelerator: by the Trainer's name.
        activation_checkpointing: whether the run will use it.
        max_seconds: the run's budget of time: on a slow machine it ends before `run_tokens` are seen.
    """
    device = device_type(accelerator)
    if device == "cuda":
        return True, ""
    if device != "cpu" or not has_cpu_compiler() or max_seconds < _MIN_RUN_SECONDS:
        return False, ""
    if 3 * config.forward_flops_per_token() * run_tokens < _MIN_RUN_SECONDS * _SLOW_CPU_FLOPS:
        return False, ""  # too short on any CPU
    if eager is None:
        eager = time_steps(config, precision, batch_size, activation_checkpointing)
    if run_tokens / eager.tokens_per_second < _MIN_RUN_SECONDS:
        return False, ""
    compiled = time_steps(config, precision, eager.rows, activation_checkpointing, compile=True)
    timed = f"timed {eager.seconds * 1e3:.4g} ms a step as it is, {compiled.seconds * 1e3:.4g} ms compiled"
    return compiled.seconds * MARGIN < eager.seconds, timed


def has_cpu_compiler() -> bool:
    """Whether torch.compile finds what it needs for a CPU: a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.is_file()


def compile_in_place(model: GPT, device: str) -> None:
    """`torch.compile` the model, in place so that names in its state dict stay what they are.

    On a CPU block by block: all blocks share one piece of code, which compiles several times faster than the whole
    model.
    """
    for part in model.h if device == "cpu" else [model]:
        part.compile()
