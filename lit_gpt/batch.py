"""`Batch` and `PairBatch`, the inputs and targets of one training step, and `IGNORE_INDEX`, which does not count."""

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


class PairBatch(NamedTuple):
    """One micro-batch of pairs of answers to the same prompt, of which the first is preferred.

    Attributes:
        idx: (B, T) int64 ids; pair p of a row is the documents 2p, with the chosen answer, and 2p + 1.
        targets: (B, T) int64 ids to predict, those of the answers; `IGNORE_INDEX` elsewhere.
        documents: (B, T) int64 number of each token's document in its row, negative in padding.
        numbers: (B, P) int64 number of each pair in its split, -1 where a row has fewer.
        reference: (B, P, 2) float32 log-probabilities of both answers by the reference model; NaN if unknown.
    """

    idx: Tensor
    targets: Tensor
    documents: Tensor
    numbers: Tensor
    reference: Tensor
