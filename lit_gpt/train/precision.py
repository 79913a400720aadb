"""The autocast hardware target: which training precision is fastest and safe on this machine for this model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from lit_gpt.errors import UserError, nearest
from lit_gpt.model.config import GPTConfig
from lit_gpt.train.step_timing import MARGIN, StepTiming, time_precisions

TrainerPrecision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
"""The precisions that can be trained in here, by the names of Lightning's Trainer."""

PRECISIONS = (*get_args(TrainerPrecision), "transformer-engine", "transformer-engine-float16")
"""All precisions that Lightning's Trainer knows. Those of Transformer Engine need layers of its own."""

_ALIASES = {
    "32": "32-true",
    "16": "16-mixed",
    "bf16": "bf16-mixed",
    "64": "64-true",
    "fp32": "32-true",
    "fp16": "16-mixed",
}


@dataclass(frozen=True)
class Decision:
    """A precision by the Trainer's name, why it was chosen, and the timings behind it, if any were needed."""

    precision: str
    reason: str
    timings: tuple[StepTiming, ...] = ()

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
        requested: `auto` or a name of Lightning's Trainer.
        config: the model.
        batch_size: rows of one micro-batch.
        block_size: tokens of a row; the config's if None.
        accelerator: by the Trainer's name: `auto`, `cpu`, `gpu`, `cuda` or `mps`.
        activation_checkpointing: whether the run will use it.

    Raises:
        UserError: for a precision that is unknown.
    """
    if requested != "auto":
        return Decision(_explicit(str(requested)), "as asked for")
    device = device_type(accelerator)
    if device == "cuda":
        return cuda_decision()
    if device != "cpu":
        return Decision("32-true", f"{device}: autocast is not reliable there")
    if not cpu_has_bf16():
        return Decision("32-true", "this CPU has no bf16 arithmetic (neither AMX nor AVX512-BF16)")
    timings = time_precisions(config, batch_size, block_size or config.block_size, activation_checkpointing)
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


def cuda_decision() -> Decision:
    """The precision for the first CUDA device: bf16 where it computes that natively, else fp16."""
    name = torch.cuda.get_device_name()
    # Counting emulation, T4 and V100 would get bf16, several times slower than fp16.
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Decision("bf16-mixed", f"{name} computes bf16 natively")
    return Decision("16-mixed", f"{name} has no native bf16: fp16 with loss scaling")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 in hardware: AMX tiles or AVX512-BF16."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def muon_arithmetic(device: str) -> torch.dtype:
    """The dtype of Muon's products: bf16 on GPUs and CPUs with native bf16, fp32 elsewhere.

    By what the hardware says and not by a timing, so that a resumed run computes as its first part did.

    Args:
        device: `cuda`, `cpu` or another type of PyTorch's.
    """
    if device == "cuda":
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_native = device == "cpu" and cpu_has_bf16()
    return torch.bfloat16 if is_native else torch.float32


def _faster(timings: tuple[StepTiming, ...]) -> Decision:
    full, mixed = timings
    ratio = full.seconds / mixed.seconds
    measured = f"timed {full.seconds * 1e3:.4g} ms a step in fp32, {mixed.seconds * 1e3:.4g} ms in bf16-mixed"
    if ratio > MARGIN:
        return Decision("bf16-mixed", f"{measured}: {ratio:.2f} times faster", timings)
    return Decision("32-true", f"{measured}: bf16 does not pay here", timings)
