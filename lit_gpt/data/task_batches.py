"""Batches of texts that are scored, longest first and divided over the ranks, and the data module that has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import lightning.pytorch as L
import torch
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.data.loader import RankShare, share_of_rank
from lit_gpt.data.tasks import ScoredText


class TaskBatch(NamedTuple):
    """Some texts that are scored.

    Attributes:
        idx: (B, T) int64 ids, padded at the end.
        targets: (B, T) int64 ids that are scored; `IGNORE_INDEX` elsewhere.
        numbers: (B,) int64 number of each text; -1 where there is none.
    """

    idx: Tensor
    targets: Tensor
    numbers: Tensor


class TaskLoader:
    """Each text once. All batches that the ranks compute at the same time have one shape.

    The longest come first: what does not fit into memory shows at once, and a batch has little padding.
    """

    def __init__(self, texts: Sequence[ScoredText], share: RankShare) -> None:
        """Batches of `share.rows` texts on each rank."""
        self._texts, self._share = texts, share
        self._order = sorted(range(len(texts)), key=lambda number: -len(texts[number].ids))  # equal on all ranks

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-len(self._texts) // (self._share.rows * self._share.ranks))

    def __iter__(self) -> Iterator[TaskBatch]:
        return map(self._read, range(len(self)))

    def _read(self, number: int) -> TaskBatch:
        share = self._share
        first = number * share.ranks * share.rows
        width = len(self._texts[self._order[first]].ids) - 1  # the longest of all ranks
        begin = first + share.rank * share.rows
        own = self._order[begin : begin + share.rows]
        idx = torch.zeros(share.rows, width, dtype=torch.int64)
        targets = torch.full_like(idx, IGNORE_INDEX)
        numbers = torch.full((share.rows,), -1, dtype=torch.int64)
        for row, text in enumerate(own):
            ids, scored, _ = self._texts[text]
            end = len(ids) - 1
            idx[row, :end] = torch.tensor(ids[:-1])
            targets[row, end - scored : end] = torch.tensor(ids[-scored:])
            numbers[row] = text
        return TaskBatch(*(tensor.pin_memory() if share.pin else tensor for tensor in (idx, targets, numbers)))


class TaskDataModule(L.LightningDataModule):
    """The texts of a file of tasks, as validation data."""

    def __init__(self, texts: Sequence[ScoredText], batch_size: int) -> None:
        """Batches of `batch_size` texts over all ranks together."""
        super().__init__()
        self._texts, self._batch_size = texts, batch_size

    def val_dataloader(self) -> TaskLoader:
        """Each text once."""
        return TaskLoader(self._texts, share_of_rank(self.trainer, self._batch_size))
