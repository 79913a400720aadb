"""Training samples of a mixture of folders: their order, and batches of them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from lit_gpt.batch import Batch
from lit_gpt.data.loader import Cursor, RankShare, TrainLoader
from lit_gpt.data.mixture import Mixture
from lit_gpt.data.shuffle import Shuffle

_STRIDE = 1 << 48
"""Between the numbers of two folders' samples, where a number stands for a folder and one of its samples."""
_ENDLESS = 1 << 62


class MixedFolder(NamedTuple):
    """A folder of a mixture.

    Attributes:
        samples: reads its samples; it is not iterated over.
        order: of its samples in each of its own epochs.
        fingerprint: of its tokens.
    """

    samples: TrainLoader
    order: Shuffle
    fingerprint: str


class MixtureOrder(Shuffle):
    """The samples of several folders as one endless epoch, in which each folder goes through epochs of its own."""

    def __init__(self, mixture: Mixture, orders: Sequence[Shuffle]) -> None:
        """`orders` are those of the folders, in the order of the mixture's."""
        self.block_size, self.seed = orders[0].block_size, orders[0].seed
        self.samples, self.window = _ENDLESS, sum(order.window for order in orders)
        self._mixture, self._orders = mixture, orders

    @property
    def epoch_samples(self) -> int:
        """As many as all folders have together: after them Lightning counts an epoch, and the stream goes on."""
        return sum(order.samples for order in self._orders)

    def starts(self, epoch: int, position: int, count: int) -> npt.NDArray[np.int64]:
        """The samples at `position` … `position + count`, (count,): folder · 2^48 + what the folder's order gives."""
        folders, numbers = self._mixture.assign(position, count)
        found = np.empty(count, np.int64)
        for folder, order in enumerate(self._orders):
            here = np.flatnonzero(folders == folder)
            if here.size:  # its samples follow one another
                found[here] = folder * _STRIDE + _samples_of(order, int(numbers[here[0]]), len(here))
        return found


def _samples_of(order: Shuffle, first: int, count: int) -> npt.NDArray[np.int64]:
    """Consecutive samples of one folder, (count,), over the edges of its epochs."""
    parts = []
    while count:
        epoch, position = divmod(first, order.samples)
        here = min(count, order.samples - position)
        parts.append(order.starts(epoch, position, here))
        first, count = first + here, count - here
    return np.concatenate(parts)


class MixtureTrainLoader(TrainLoader):
    """Micro-batches of samples of several folders, from the cursor on; see `TrainLoader`."""

    def __init__(self, folders: Sequence[MixedFolder], order: MixtureOrder, cursor: Cursor, share: RankShare) -> None:
        """Nothing is read yet; `order` is of the same folders."""
        self._folders = folders
        self._shuffle, self._cursor, self._share = order, cursor, share
        self._on_spans = lambda spans: None  # the folders are on this machine

    def _needed(self, epoch: int, position: int, count: int) -> list[tuple[int, int]]:
        """Nothing that has to be fetched."""
        return []

    def _read(self, starts: np.ndarray) -> Batch:
        folders, samples = np.divmod(starts, _STRIDE)
        parts, rows = [], []
        for folder in np.unique(folders).tolist():
            here = np.flatnonzero(folders == folder)
            parts.append(self._folders[folder].samples._read(samples[here]))
            rows.append(torch.from_numpy(here))
        back = torch.cat(rows).argsort()  # from the order of folders to that of the samples
        joined = [None if tensors[0] is None else torch.cat(tensors)[back] for tensors in zip(*parts)]
        if self._share.pin:
            joined = [None if tensor is None else tensor.pin_memory() for tensor in joined]
        return Batch(*joined)  # type: ignore[arg-type]


def mixture_fingerprint(mixture: Mixture, folders: Sequence[MixedFolder]) -> str:
    """A hash of the folders' tokens and shares, in their order."""
    parts = [f"{share} {folder.fingerprint}" for share, folder in zip(mixture.shares.tolist(), folders)]
    return hashlib.sha256("\n".join(["mixture", *parts]).encode()).hexdigest()
