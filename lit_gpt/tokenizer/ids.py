"""The check of token ids against a vocabulary: for a list, and vectorised for an array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def id_outside(ids: Sequence[int], n_vocab: int) -> int | None:
    """An id that is not in 0 … `n_vocab` - 1, the smallest if it is negative, else the largest; None if all are.

    >>> id_outside([3, 7, 5], 6)
    7
    """
    if not ids:
        return None
    low, high = min(ids), max(ids)
    return low if low < 0 else high if high >= n_vocab else None


def index_outside(ids: npt.NDArray[np.integer], n_vocab: int) -> int | None:
    """The index in `ids` (T,) of the first that is not in 0 … `n_vocab` - 1; None if all are.

    One pass where all are: the training loader calls it for every sample.

    >>> index_outside(np.array([3, 7, 5, 9]), 6)                              # doctest: +SKIP
    1
    """
    if not ids.size or (int(ids.max()) < n_vocab and (ids.dtype.kind == "u" or int(ids.min()) >= 0)):
        return None
    return int(((ids < 0) | (ids >= n_vocab)).argmax())
