"""The check of token ids against a vocabulary."""

from __future__ import annotations

from collections.abc import Sequence


def id_outside(ids: Sequence[int], n_vocab: int) -> int | None:
    """An id that is not in 0 … `n_vocab` - 1, the smallest if it is negative, else the largest; None if all are.

    >>> id_outside([3, 7, 5], 6)
    7
    """
    if not ids:
        return None
    low, high = min(ids), max(ids)
    return low if low < 0 else high if high >= n_vocab else None
