"""`Batch`, the inputs and targets of one training step, and `IGNORE_INDEX`, the target that does not count."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

IGNORE_INDEX = -100
"""A target that does not count, as in `torch.nn.functional.cross_entropy`."""


class Batch(NamedTuple):
    """One micro-batch. Whatever gives (idx, targets) alone is taken too: `Batch(*pair)`.

    Attributes:
        idx: (B, T) int64 ids.
        targets: (B, T) int64 ids to predict; `IGNORE_INDEX` where nothing counts, as in padding.
        documents: (B, T) int64, the number of the document of each token, equal over one stretch of a row: attention
            stays inside each, and positions begin at 0 in each. None where a row is one text.
    """

    idx: Tensor
    targets: Tensor
    documents: Tensor | None = None
