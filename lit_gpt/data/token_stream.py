"""The tokens of one split, over all its shards, as if they were one array; and their check against the vocabulary."""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from lit_gpt.data.index import Shard, ShardIndex
from lit_gpt.data.shards import Tokens, read_tokens
from lit_gpt.errors import UserError
from lit_gpt.files.locks import Lock
from lit_gpt.tokenizer.ids import index_outside

OPEN_FILES = 64


class TokenStream:
    """All tokens of one split, end to end, as if they were one array.

    It reads with `pread`: pages never count as this process's memory (those of a memory map do, and it grows), and a
    file that shrinks under us is an error and not a SIGBUS. Safe to use from several threads.

    Attributes:
        shards: the files, in order.
        dtype: "uint16" or "uint32".
        documents: how many, as far as the index says (0 without one).
        text_bytes: UTF-8 bytes of the text, as far as the index says.
        lock: held on the folder as long as the stream exists, if its opener has set one.
    """

    lock: Lock | None = None

    def __init__(self, index: ShardIndex, split: str, locate: Callable[[Shard], Path], local: bool) -> None:
        """Open nothing yet; see `open_split`.

        Args:
            index: of the whole folder.
            split: "train", "val" or "test".
            locate: gives a shard's file on this machine, fetching it first if need be.
            local: whether all files are here already.
        """
        self.shards, self.dtype, self._locate, self._local = index.split(split), index.dtype, locate, local
        self.documents = sum(shard.documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        self._ends = list(accumulate(shard.tokens for shard in self.shards))
        self._open: OrderedDict[int, int] = OrderedDict()  # shard number → file descriptor, least recently used first
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Tokens in all."""
        return self._ends[-1] if self._ends else 0

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def read(self, start: int, count: int) -> Tokens:
        """Tokens `start` … `start + count` as a new array (count,) of the stream's dtype; shard borders do not show.

        Raises:
            IndexError: if they are not all inside the stream.
            UserError: if a file has shrunk since it was opened.
        """
        if not 0 <= start <= start + count <= len(self):
            raise IndexError(f"tokens {start} to {start + count} of a stream of {len(self)}")
        pieces: list[Tokens] = []
        while count or not pieces:
            number = min(bisect_right(self._ends, start), len(self.shards) - 1)
            offset = start - (self._ends[number] - self.shards[number].tokens)
            piece = self._read_shard(number, offset, min(count, self._ends[number] - start))
            pieces.append(piece)
            start, count = start + piece.size, count - piece.size
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def shard_range(self, start: int, count: int) -> range:
        """Numbers (in `shards`) of the shards that hold tokens `start` … `start + count`."""
        return range(bisect_right(self._ends, start), bisect_right(self._ends, start + count - 1) + 1)

    @property
    def fingerprint(self) -> str:
        """A hash of what the tokens are. Shards of unknown hash count by size and, on this machine, by their ends."""
        digest = hashlib.sha256(self.dtype.encode())
        for number, shard in enumerate(self.shards):
            digest.update(f"\n{shard.tokens} {shard.sha256 or self._ends_of(number)}".encode())
        return digest.hexdigest()

    def _ends_of(self, number: int) -> str:
        if not self._local:
            return str(self.shards[number].bytes)
        total = self.shards[number].tokens
        count = min(total, 4096)
        ends = (self._read_shard(number, 0, count), self._read_shard(number, total - count, count))
        return hashlib.sha256(b"".join(end.tobytes() for end in ends)).hexdigest()

    def _read_shard(self, number: int, offset: int, count: int) -> Tokens:
        """Tokens `offset` … `offset + count` of one shard."""
        with self._lock:
            return read_tokens(self._descriptor(number), self.shards[number], self.dtype, offset, count)

    def _descriptor(self, number: int) -> int:
        """An open file; the least recently used of many is closed for it."""
        if number not in self._open:
            self._open[number] = self._open_file(self.shards[number])
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(number)
        return self._open[number]

    def _open_file(self, shard: Shard) -> int:
        """Locate a shard and open it; another process may empty a shared cache between the two."""
        for _ in range(3):
            with suppress(FileNotFoundError):
                return os.open(self._locate(shard), os.O_RDONLY)
        return os.open(self._locate(shard), os.O_RDONLY)


def open_split(index: ShardIndex, split: str, where: str, locate: Callable[[Shard], Path], local: bool) -> TokenStream:
    """The tokens of one split of an index; see `TokenStream`.

    Raises:
        UserError: if it has no shard of that split, or only empty ones.
    """
    stream = TokenStream(index, split, locate, local)
    if not len(stream):
        have = ", ".join(shard.name for shard in index.shards[:3]) or "no shards at all"
        raise UserError(
            f'{where}: no {split} shards (a file name with "{split}" in it), it has {have}; prepare it again'
        )
    return stream


def check_ids(tokens: Tokens, vocab_size: int | None, where: str, start: int) -> None:
    """Refuse ids that the vocabulary does not have.

    Args:
        tokens: (n,).
        vocab_size: None lets everything pass.
        where: the shard's or split's name.
        start: position of the first of the tokens, for the message.

    Raises:
        UserError: naming the first such id and its position.
    """
    bad = None if vocab_size is None else index_outside(tokens, vocab_size)
    if vocab_size is not None and bad is not None:
        raise UserError(
            f"{where}: token {start + bad} is id {tokens[bad]}, but the vocabulary ends at {vocab_size - 1}; "
            "name the tokenizer that the shards were made with"
        )
