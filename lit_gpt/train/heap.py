"""The C library's heap, which by default keeps what training has freed."""

from __future__ import annotations

import ctypes

_M_MMAP_THRESHOLD = -3  # of mallopt(3)
_BYTES = 1 << 20
_LEAST_WIDTH = 768


def return_freed_memory(width: int, precision: str | None) -> None:
    """Give each tensor of over 1 MiB on the CPU memory of its own, which goes back to the system when it is freed.

    glibc puts tensors of up to 32 MiB into one heap once some have been freed, where holes between them stay: a step of
    LoRA on GPT-2 124M, 4 × 256 tokens in fp32, held 1,290 MB in the fourth step where 970 were in use. Fresh memory
    costs time to clear. In wide models in fp32 the products of a tensor cost so much more that no step became slower;
    the steps of a model of width 256 in bf16 took half as long again, so that these are left alone.

    Args:
        width: `n_embd` of the model.
        precision: the Trainer's.
    """
    if width < _LEAST_WIDTH or precision != "32-true":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _BYTES)
