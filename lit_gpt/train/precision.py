"""The autocast hardware target: which precision is fastest and safe on this machine for this model; what to compile.

What the hardware settles is looked up, what it does not settle is timed: on one and the same CPU bf16 autocast won or
lost by factors, depending on the shapes and on which kernels PyTorch has for them.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_gpt.errors import UserError, nearest
from lit_gpt.inference import native
from lit_gpt.model.config import GPTConfig
from lit_gpt.model.gpt import GPT

PRECISIONS = (
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "bf16-true",
    "16-true",
    "64-true",
    "transformer-engine",
    "transformer-engine-float16",
)
"""What Lightning's Trainer knows."""

_ALIASES = {
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "64": "64-true",
    "fp32": "32-true",
    "fp16": "16-mixed",
}
_MARGIN = 1.05  # bf16 must win by this much: at a tie fp32 is the safer one
_PROBE_SECONDS = 2.0
_COMPILE_SECONDS = 300.0  # a run must last this long for half a minute of trying it out
_SLOW_CPU_FLOPS = 2e10
_STEPS = 5
_PROBE_FLOPS = 5e11  # of a probed step: a few seconds for a CPU


@dataclass(frozen=True)
class Timing:
    """What one training step (forward and backward pass) took."""

    precision: str
    seconds: float
    tokens: int
    rows: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Tokens in one second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Decision:
    """A precision as the Trainer takes it, why it was chosen, and the timings behind it, if any were needed."""

    precision: str
    reason: str
    timings: tuple[Timing, ...] = ()

    def __str__(self) -> str:
        return f"precision {self.precision}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a checkpoint holds them."""
        seconds = {timing.precision: timing.seconds for timing in self.timings}
        return {"precision": self.precision, "reason": self.reason, "seconds_per_step": seconds}


def resolve_precision(
    requested: str,
    config: GPTConfig,
    batch_size: int,
    block_size: int | None = None,
    accelerator: str = "auto",
    activation_checkpointing: bool = False,
) -> Decision:
    """The precision to train `config` in, on this machine. An explicit `requested` always wins.

    `auto`: CUDA with native bf16 → `bf16-mixed`, older CUDA → `16-mixed`; MPS and CPUs without AMX or AVX512-BF16 →
    `32-true`; on the other CPUs one real step is timed in both precisions. Call it on rank 0 only and broadcast the
    result: two ranks may time differently.

    Args:
        requested: `auto` or what Lightning's Trainer takes.
        config: the model.
        batch_size: rows of one micro-batch.
        block_size: tokens of a row; the config's if None.
        accelerator: as the Trainer takes it: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        activation_checkpointing: whether the run will use it.

    Raises:
        UserError: for a precision that is unknown.
    """
    if requested != "auto":
        return Decision(_explicit(str(requested)), "as asked for")
    device = device_type(accelerator)
    if device == "cuda":
        return _cuda_decision()
    if device != "cpu":
        return Decision("32-true", f"{device}: autocast is not reliable there")
    if not cpu_has_bf16():
        return Decision("32-true", "this CPU has no bf16 arithmetic (neither AMX nor AVX512-BF16)")
    timings = probe(config, batch_size, block_size or config.block_size, activation_checkpointing)
    return _faster(timings)


def _explicit(requested: str) -> str:
    precision = _ALIASES.get(requested, requested)
    if precision not in PRECISIONS:
        raise UserError(f'unknown precision "{requested}": {nearest(requested, ["auto", *PRECISIONS])}')
    return precision


def device_type(accelerator: str = "auto") -> str:
    """`cuda`, `mps` or `cpu`: what the Trainer will make of its `accelerator`."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    best = "cuda" if cuda else "mps" if mps else "cpu"
    return best if accelerator in ("auto", "gpu") else accelerator


def _cuda_decision() -> Decision:
    name = torch.cuda.get_device_name()
    # Counting emulation, T4 and V100 would get bf16, several times slower than fp16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Decision("bf16-mixed", f"{name} computes bf16 natively")
    return Decision("16-mixed", f"{name} has no native bf16: fp16 with loss scaling")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware: AMX tiles or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _faster(timings: tuple[Timing, ...]) -> Decision:
    full, mixed = timings
    ratio = full.seconds / mixed.seconds
    measured = f"timed {full.seconds * 1e3:.4g} ms a step in fp32, {mixed.seconds * 1e3:.4g} ms in bf16-mixed"
    if ratio > _MARGIN:
        return Decision("bf16-mixed", f"{measured}: {ratio:.2f} times faster", timings)
    return Decision("32-true", f"{measured}: bf16 does not pay here", timings)


def probe(
    config: GPTConfig, batch_size: int, block_size: int, activation_checkpointing: bool = False
) -> tuple[Timing, Timing]:
    """Time a training step of a throw-away model on the CPU in `32-true` and in `bf16-mixed`.

    The optimizer is left out: it works on the same fp32 weights in both. Rows of the batch are dropped where a step
    would take long: the products are large enough then for time to be proportional to the rows.
    """
    row_flops = 3 * block_size * config.forward_flops_per_token(block_size)
    rows = min(batch_size, max(1, int(_PROBE_FLOPS / row_flops)))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = GPT(config).train()
        model.activation_checkpointing = activation_checkpointing
        idx = torch.randint(config.vocab_size, (rows, block_size))
        best = {"32-true": float("inf"), "bf16-mixed": float("inf")}
        until = time.perf_counter() + _PROBE_SECONDS
        while True:  # in turn, and the fastest of each: neither warm-up nor a busy machine decides
            for precision in best:
                best[precision] = min(best[precision], _step_seconds(model, idx, precision))
            if time.perf_counter() > until:
                break
    full, mixed = (Timing(precision, seconds, idx.numel(), rows) for precision, seconds in best.items())
    return full, mixed


def _step_seconds(model: GPT, idx: Tensor, precision: str) -> float:
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        output = model(idx, idx)
    (output.loss_sum / output.n_targets).backward()
    model.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def resolve_compile(
    config: GPTConfig,
    precision: str,
    batch_size: int,
    run_tokens: int,
    eager: Timing | None = None,
    accelerator: str = "auto",
    activation_checkpointing: bool = False,
) -> tuple[bool, str]:
    """Whether `torch.compile` earns its time back in a training run, and the timing that says so, "" if there is none.

    On a GPU it does. On a CPU it is timed, where the run is long enough for that: it was seen to make steps of 0.8M
    parameters a fifth faster and steps of 124M parameters a quarter slower.

    Args:
        config: the model.
        precision: as the Trainer takes it.
        batch_size: rows of one micro-batch.
        run_tokens: tokens of the whole run; 0 if unknown.
        eager: a step without it, if `resolve_precision` has timed one.
        accelerator: as the Trainer takes it.
        activation_checkpointing: whether the run will use it.
    """
    device = device_type(accelerator)
    if device == "cuda":
        return True, ""
    if device != "cpu" or not _cpu_compiler():
        return False, ""
    if 3 * config.forward_flops_per_token() * run_tokens < _COMPILE_SECONDS * _SLOW_CPU_FLOPS:
        return False, ""  # too short on any CPU
    if eager is None:
        eager = _time_steps(config, precision, batch_size, activation_checkpointing)
    if run_tokens / eager.tokens_per_second < _COMPILE_SECONDS:
        return False, ""
    compiled = _time_steps(config, precision, eager.rows, activation_checkpointing, compile=True)
    timed = f"timed {eager.seconds * 1e3:.4g} ms a step as it is, {compiled.seconds * 1e3:.4g} ms compiled"
    return compiled.seconds * _MARGIN < eager.seconds, timed


def _time_steps(
    config: GPTConfig, precision: str, rows: int, activation_checkpointing: bool, compile: bool = False
) -> Timing:
    """The fastest of a few steps of a throw-away model on the CPU, with its blocks compiled or not."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = GPT(config).train()
        model.activation_checkpointing = activation_checkpointing
        for block in model.h if compile else ():
            block.compile()
        idx = torch.randint(config.vocab_size, (rows, config.block_size))
        seconds = min(_step_seconds(model, idx, precision) for _ in range(_STEPS))
    return Timing(precision, seconds, idx.numel(), rows)


def _cpu_compiler() -> bool:
    """Whether torch.compile finds what it needs for a CPU: a C++ compiler and Python's headers."""
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which(os.environ.get("CXX", "g++")) is not None and headers.is_file()


def hardware_table() -> list[tuple[str, str]]:
    """What `auto` looks at, as (name, value) rows for people."""
    rows = [
        ("CPU", f"{os.cpu_count()} cores, PyTorch uses {torch.get_num_threads()} threads"),
        ("AMX tiles", _yes(torch.cpu._is_amx_tile_supported())),
        ("AVX512-BF16", _yes(torch.cpu._is_avx512_bf16_supported())),
        ("AVX512-VNNI", _yes(torch.cpu._is_vnni_supported())),
        ("decoding kernels", native.status()),
        ("torch.compile on the CPU", _yes(_cpu_compiler())),
        ("MPS", _yes(torch.backends.mps.is_available())),
        ("CUDA", f"{torch.cuda.device_count()} devices" if torch.cuda.is_available() else "no"),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        rows.append((f"cuda:{index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB"))
    if torch.cuda.is_available():
        rows.append(("native bf16", _yes(torch.cuda.is_bf16_supported(including_emulation=False))))
    rows.append(("training auto", _rule()))
    return rows


def _rule() -> str:
    device = device_type()
    if device == "cuda":
        return str(_cuda_decision())
    if device == "cpu" and cpu_has_bf16():
        return "32-true or bf16-mixed: one real step of the model is timed in both"
    return "32-true"


def _yes(value: bool) -> str:
    return "yes" if value else "no"
