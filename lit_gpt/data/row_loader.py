"""Batches of packed rows for training and validation: of conversations, of pairs of answers, of documents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lit_gpt.batch import Batch
from lit_gpt.data.loader import Cursor, EvalLoader, RankShare, TrainLoader
from lit_gpt.data.shuffle import Shuffle
from lit_gpt.data.token_stream import TokenStream


class PackedRows(Protocol):
    """Rows of one split.

    Attributes:
        tokens: of the split.
        block_size: T.
    """

    tokens: TokenStream
    block_size: int

    def __len__(self) -> int:
        """Rows."""

    def read(self, rows: Sequence[int], size: int, pin: bool) -> Any:
        """Some rows as a batch of `size` rows, filled up with padding; `Any`: a `Batch`, or of pairs a `PairBatch`.

        Args:
            rows: numbers of rows.
            size: B.
            pin: in page-locked memory, for a GPU.
        """


def shuffle_rows(rows: PackedRows, seed: int) -> Shuffle:
    """The order of the rows in each epoch, in which every row comes once."""
    return Shuffle(len(rows) + 1, 1, seed)


class RowTrainLoader(TrainLoader):
    """Micro-batches of rows, from the cursor on; see `TrainLoader`."""

    def __init__(self, rows: PackedRows, shuffle: Shuffle, cursor: Cursor, share: RankShare) -> None:
        """Nothing is read yet; `shuffle` is that of `shuffle_rows`."""
        super().__init__(rows.tokens, shuffle, cursor, share)
        self._rows = rows

    def _read(self, starts: np.ndarray) -> Batch:
        return self._rows.read(starts.tolist(), len(starts), self._share.pin)


class RowEvalLoader(EvalLoader):
    """Every row once, divided over the ranks; see `EvalLoader`."""

    def __init__(self, rows: PackedRows, share: RankShare) -> None:
        """Nothing is read yet."""
        super().__init__(rows.tokens, rows.block_size, share)
        self._rows = rows
        self.windows = len(rows)

    def _read(self, number: int) -> Batch:
        share = self._share
        first = (number * share.ranks + share.rank) * share.rows
        return self._rows.read(range(first, min(first + share.rows, self.windows)), share.rows, share.pin)
