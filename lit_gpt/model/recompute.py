"""Activations that are computed again in the backward pass instead of being kept until then."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def recomputed(tensor: Tensor, again: Callable[[], Tensor]) -> Iterator[None]:
    """Whatever the operations inside save of `tensor` for the backward pass is computed there by `again` instead.

    Args:
        tensor: a contiguous one.
        again: the same values; what it holds on to stays in memory.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():  # the compiler decides this by itself
        yield
        return
    address, count, dtype = tensor.data_ptr(), tensor.numel(), tensor.dtype

    def pack(saved: Tensor) -> Tensor | torch.Size:
        is_it = saved.data_ptr() == address and saved.numel() == count and saved.dtype == dtype
        return saved.shape if is_it and saved.is_contiguous() else saved

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return again().view(kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
