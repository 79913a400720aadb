"""`Batch`, the inputs and targets of one training step, and `IGNORE_INDEX`, the target that does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count, as in `torch.nn.functional.cross_entropy`."""

Batch: TypeAlias = "tuple[Tensor, Tensor]"
"""(idx, targets), both (B, T) int64; targets of padding are `IGNORE_INDEX`."""
