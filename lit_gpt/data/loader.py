"""Batches of token windows: an endless resumable stream for training, and every token once for validation."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.data.shuffle import Shuffle
from lit_gpt.data.token_stream import TokenStream, check_ids

PREFETCHED_BATCHES = 4  # batches made ahead of the training step
PLANNED_SAMPLES = 1024  # samples whose positions in the stream are computed at once
Item = TypeVar("Item")


@dataclass(frozen=True)
class RankShare:
    """One rank's share of an optimizer step, whose samples are divided as (micro-batches, ranks, rows)."""

    rows: int  # of a micro-batch on one rank
    ranks: int = 1
    rank: int = 0
    accumulate: int = 1  # micro-batches per optimizer step
    pin: bool = False  # batches in page-locked memory, for a GPU

    @property
    def step(self) -> int:
        """Samples per optimizer step, over all ranks."""
        return self.rows * self.ranks * self.accumulate


def share_of_rank(trainer: Any, batch_size: int, accumulate: int = 1) -> RankShare:
    """A rank's share of a batch of `batch_size` rows over all ranks together; at least one row.

    `Any`: a Lightning Trainer, which this file does not import; None for one process without one.
    """
    if trainer is None:
        return RankShare(batch_size)
    pin = trainer.strategy.root_device.type == "cuda"
    return RankShare(max(1, batch_size // trainer.world_size), trainer.world_size, trainer.global_rank, accumulate, pin)


@dataclass
class Cursor:
    """Where training stands: the first sample of the optimizer step that is not finished.

    Attributes:
        before: (epoch, position) before the latest batch was yielded.
    """

    epoch: int = 0
    position: int = 0
    before: tuple[int, int] = (0, 0)

    def move(self, epoch: int, position: int) -> None:
        """To the position after a batch."""
        self.before = self.epoch, self.position
        self.epoch, self.position = epoch, position

    def reset(self, epoch: int = 0, position: int = 0) -> None:
        """To the position at which training starts."""
        self.epoch, self.position = self.before = epoch, position


class TrainLoader:
    """Micro-batches of this rank, from the cursor on: as many as an epoch has, whether or not they cross its edge.

    The cursor moves in the process that trains, before a batch is yielded: a checkpoint made after the batch counts it
    as done. It is read at the first `next`, not at `iter`, which Lightning calls before it restores anything. It counts
    whole optimizer steps, since a checkpoint in the middle of one has lost the gradients so far.
    """

    def __init__(
        self,
        stream: TokenStream,
        shuffle: Shuffle,
        cursor: Cursor,
        share: RankShare,
        vocab_size: int | None = None,
        on_spans: Callable[[list[tuple[int, int]]], None] = lambda spans: None,
    ) -> None:
        """Nothing is read yet.

        Args:
            stream: the tokens.
            shuffle: the order of the samples.
            cursor: shared with whoever saves and restores it.
            share: this rank's part.
            vocab_size: ids at or above it are refused.
            on_spans: called with the (first token, number of tokens) that will be needed next, soonest first.
        """
        self._stream, self._shuffle, self._cursor, self._share = stream, shuffle, cursor, share
        self._vocab_size, self._on_spans = vocab_size, on_spans

    def __len__(self) -> int:
        """Micro-batches in an epoch; the samples that fill no whole optimizer step are left out."""
        return self._shuffle.epoch_samples // self._share.step * self._share.accumulate

    def __iter__(self) -> Iterator[Batch]:
        batches = prefetched(lambda: self._batches(self._cursor.epoch, self._cursor.position))
        for epoch, position, batch in islice(batches, len(self)):
            self._cursor.move(epoch, position)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Nothing: the cursor is the DataModule's. Without this method Lightning warns that it can't resume."""
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Nothing; see `state_dict`."""

    def _batches(self, epoch: int, position: int) -> Iterator[tuple[int, int, Batch]]:
        """Batches, each with the cursor's (epoch, position) after it."""
        step = self._share.step
        while True:
            if position + step > self._shuffle.samples:
                epoch, position = epoch + 1, 0
            steps = min(max(1, PLANNED_SAMPLES // step), (self._shuffle.samples - position) // step)
            self._on_spans(self._needed(epoch, position, steps * step))
            for starts in self._shuffle.starts(epoch, position, steps * step).reshape(steps, -1):
                by_micro_batch = starts.reshape(self._share.accumulate, self._share.ranks, self._share.rows)
                for rows in by_micro_batch[:-1, self._share.rank]:
                    yield epoch, position, self._read(rows)
                batch = self._read(by_micro_batch[-1, self._share.rank])
                position += step
                yield epoch, position, batch

    def _needed(self, epoch: int, position: int, count: int) -> list[tuple[int, int]]:
        """The windows of the samples at hand, and the one after them."""
        last = min(position + count - 1 + self._shuffle.window, self._shuffle.samples - 1)
        positions = [*range(position, last, self._shuffle.window), last]
        return [self._shuffle.span(epoch, each) for each in positions]

    def _read(self, starts: np.ndarray) -> Batch:
        size = self._shuffle.block_size
        idx, targets = np.empty((2, len(starts), size), np.int64)
        for row, start in enumerate(starts.tolist()):
            tokens = self._stream.read(start, size + 1)
            check_ids(tokens, self._vocab_size, self._stream.shards[0].name, start)
            idx[row], targets[row] = tokens[:-1], tokens[1:]
        return as_tensors(idx, targets, self._share.pin)


class EvalLoader:
    """Every token but the first as a target, once: windows side by side, divided over the ranks.

    All batches have one shape on every rank. What is left over is padding, with targets that do not count.
    """

    def __init__(self, stream: TokenStream, block_size: int, share: RankShare, vocab_size: int | None = None) -> None:
        """See `TrainLoader`; `block_size` is T."""
        self._stream, self._size, self._share, self._vocab_size = stream, block_size, share, vocab_size
        self.windows = -(-(len(stream) - 1) // block_size)

    @property
    def fingerprint(self) -> str:
        """A hash of what the tokens are."""
        return self._stream.fingerprint

    def __len__(self) -> int:
        """Batches on each rank."""
        return -(-self.windows // (self._share.rows * self._share.ranks))

    def __iter__(self) -> Iterator[Batch]:
        return prefetched(lambda: map(self._read, range(len(self))))

    def _read(self, number: int) -> Batch:
        share = self._share
        idx = np.zeros((share.rows, self._size), np.int64)
        targets = np.full_like(idx, IGNORE_INDEX)
        first = (number * share.ranks + share.rank) * share.rows
        for row in range(min(share.rows, self.windows - first)):
            start = (first + row) * self._size
            tokens = self._stream.read(start, min(self._size + 1, len(self._stream) - start))
            check_ids(tokens, self._vocab_size, self._stream.shards[0].name, start)
            idx[row, : tokens.size - 1], targets[row, : tokens.size - 1] = tokens[:-1], tokens[1:]
        return as_tensors(idx, targets, share.pin)


def as_tensors(idx: np.ndarray, targets: np.ndarray, pin: bool, documents: np.ndarray | None = None) -> Batch:
    """The arrays as tensors, page-locked for a GPU."""
    arrays = (idx, targets) if documents is None else (idx, targets, documents)
    tensors = map(torch.from_numpy, arrays)
    return Batch(*(tensor.pin_memory() if pin else tensor for tensor in tensors))


def prefetched(make: Callable[[], Iterator[Item]]) -> Iterator[Item]:
    """The items of `make()`, produced up to `PREFETCHED_BATCHES` ahead by a thread that ends with this iterator.

    `make` is called at the first `next`. What it raises is raised here.
    """
    ready: deque[Item | BaseException | None] = deque()
    changed, stop = threading.Condition(), threading.Event()

    def put(item: Item | BaseException | None) -> bool:
        with changed:
            changed.wait_for(lambda: len(ready) < PREFETCHED_BATCHES or stop.is_set())
            ready.append(item)
            changed.notify_all()
        return not stop.is_set()

    def produce(items: Iterator[Item]) -> None:
        try:
            if all(map(put, items)):
                put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=produce, args=(make(),), name="lit_gpt data", daemon=True).start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: bool(ready))
                item = ready.popleft()
                changed.notify_all()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        with changed:
            stop.set()
            changed.notify_all()
