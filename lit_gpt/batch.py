"""A batch as the data makes it and the model takes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count, as in `torch.nn.functional.cross_entropy`."""

Batch: TypeAlias = "tuple[Tensor, Tensor]"
"""(idx, targets), both (B, T) int64; targets of padding are `IGNORE_INDEX`."""
