"""The C library's heap, which by default keeps what training has freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_BYTES = 4 << 20
_LEAST_WIDTH = 768


def return_freed_memory(width: int, precision: str | None) -> None:
    """Give each tensor of over 4 MiB on the CPU memory of its own, which goes back to the system when it is freed.

    glibc puts tensors of up to 32 MiB into one heap once some have been freed, where holes between them stay: a step of
    LoRA on GPT-2 124M, 4 × 256 tokens in fp32, held 1,270 to 1,320 MB in the fourth step and holds 1,190 to 1,220 so.
    Fresh memory costs time to clear, which the products of a wide model in fp32 outweigh: no step became slower. From
    1 MiB on it were 970 MB and steps slower by a tenth; a model of width 256 in bf16 needed half as long again.

    Args:
        width: `n_embd` of the model.
        precision: the Trainer's.
    """
    if width < _LEAST_WIDTH or precision != "32-true":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BYTES)
