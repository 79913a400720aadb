"""Continuations of a text in the training tokens: its longest suffix that occurs there, and what came next, how often.

Exact, in one pass over the stream without an index: where the text's last token stands is one vectorised comparison,
and what is left is compared backwards token by token. A stream of 100 M tokens of two bytes is 200 MB to read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lit_gpt.data.matches import Tokens

PIECE = 1 << 22
"""Tokens of the stream in memory at a time."""
KEPT_POSITIONS = 1000
"""Occurrences whose positions are kept: the first ones."""


@dataclass(frozen=True)
class Continuations:
    """What followed the longest suffix of a text that occurs in a stream with a token after it.

    Attributes:
        length: tokens of that suffix; 0 if not even the last token occurs.
        counts: id of the token that came next → how often, the most frequent first.
        positions: where the suffix ends in the stream: the position of the token that came next, in ascending order, of
            the first `KEPT_POSITIONS` occurrences.
    """

    length: int
    counts: dict[int, int]
    positions: NDArray[np.int64]

    @property
    def occurrences(self) -> int:
        """How often the suffix occurs."""
        return sum(self.counts.values())


def find_continuations(text: Sequence[int], stream: Tokens, piece: int = PIECE) -> Continuations:
    """Find the longest suffix of `text` in `stream`, all of its occurrences, and what followed each.

    Args:
        text: token ids.
        stream: what to search.
        piece: tokens to search at a time.
    """
    backwards = [int(token) for token in reversed(text)]
    length, positions, counts = 0, np.empty(0, np.int64), np.empty(0, np.int64)
    total = len(stream)
    for start in range(0, total - 1, piece) if backwards else ():
        before = min(start, len(backwards) - 1)  # a match may begin in the piece before
        size = min(piece, total - 1 - start)
        window = stream.read(start - before, before + size + 1)
        matches, found = _longest(window, backwards, before, before + size)
        if found < max(1, length):
            continue
        if found > length:
            length, positions, counts = found, positions[:0], counts[:0]
        ends = matches[: KEPT_POSITIONS - len(positions)] + (start - before + 1)
        positions = np.concatenate([positions, ends])
        more = np.bincount(window[matches + 1], minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    return Continuations(length, dict(zip(order.tolist(), counts[order].tolist())), positions)


def _longest(
    window: NDArray[np.generic], backwards: Sequence[int], first: int, past: int
) -> tuple[NDArray[np.int64], int]:
    """Where the longest match ends among positions `first` … `past` - 1 of `window`, and its length."""
    matches = np.flatnonzero(window[first:past] == backwards[0]) + first
    length = int(len(matches) > 0)
    while len(matches) and length < len(backwards):
        inside = matches[matches >= length]
        longer = inside[window[inside - length] == backwards[length]]
        if not len(longer):
            break
        matches, length = longer, length + 1
    return matches, length
