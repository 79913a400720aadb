"""Token shards: the only file that knows their byte format.

A shard is llm.c's: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens. `prepare`
writes an `index.json` beside them. Folders without one are read as they are: llm.c's public sets, and nanoGPT's
headerless `train.bin` and `val.bin`. A file belongs to the split that its name mentions: train, val or test.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from lit_gpt.atomic import atomic_write
from lit_gpt.data.index import INDEX, Shard, ShardIndex
from lit_gpt.errors import UserError

Tokens = npt.NDArray[np.unsignedinteger]

FORMATS = {"uint16": (20240520, 1), "uint32": (20240801, 7)}  # dtype → (magic, version)
HEADER_BYTES = 1024
MAX_TOKENS = 2**31 - 1  # the header counts in int32
JOURNAL = "prepare.json"  # what a preparation keeps while it is under way; beside an index it means nothing
SPLITS = ("train", "val", "test")
OPEN_FILES = 64
CHECK_TOKENS = 1 << 22  # read at a time when whole shards are checked


def dtype_for(vocab_size: int) -> str:
    """The smallest of the two dtypes that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def little_endian(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The numpy dtype of the tokens on disk."""
    return np.dtype(dtype).newbyteorder("<")


# ---------------------------------------------------------------- headers


def describe(name: str, head: bytes, size: int, where: str) -> tuple[str, Shard]:
    """What a file's first bytes and size say about it.

    Args:
        name: the file's name.
        head: its first `HEADER_BYTES` bytes, or all of it.
        size: its size in bytes.
        where: its path or address, for error messages.

    Returns:
        The dtype and the shard (without a hash).

    Raises:
        UserError: wrong magic, wrong version, or a size that does not fit the header's count.
    """
    magic, version, tokens = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    dtype = next((dtype for dtype, known in FORMATS.items() if known[0] == magic), None)
    if dtype is None:
        if name not in {f"{split}.bin" for split in SPLITS}:  # only nanoGPT's own names go without a header
            known_magics = " or ".join(str(known[0]) for known in FORMATS.values())
            raise UserError(
                f"{where}: wrong magic {magic}, not {known_magics}: not a token shard; remove it from the folder"
            )
        if size == 0 or size % 2:
            raise UserError(f"{where}: {size} bytes are no whole number of uint16 tokens: truncated; make it again")
        return "uint16", Shard(name, size // 2, size)
    if version != FORMATS[dtype][1]:
        raise UserError(
            f"{where}: version {version} of magic {magic} is unknown, only {FORMATS[dtype][1]}; make it again"
        )
    expected = HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise UserError(
            f"{where}: {size} bytes, but its header promises {expected}: truncated or damaged; make it again"
        )
    return dtype, Shard(name, tokens, size)


def describe_file(path: Path) -> tuple[str, Shard]:
    """`describe` for a file on this machine."""
    with path.open("rb") as file:
        return describe(path.name, file.read(HEADER_BYTES), path.stat().st_size, str(path))


def index_of(described: Iterable[tuple[str, Shard]], where: str) -> ShardIndex:
    """The index of shards that have none, in the order of their names.

    Raises:
        UserError: if some are uint16 and some are uint32, which no one tokenizer writes.
    """
    found = sorted(described, key=lambda item: item[1].name)
    dtypes = {dtype: shard.name for dtype, shard in found}
    if len(dtypes) > 1:
        mixed = ", ".join(f"{name} ({dtype})" for dtype, name in dtypes.items())
        raise UserError(f"{where}: shards of different tokenizers are mixed: {mixed}; keep them in separate folders")
    return ShardIndex(next(iter(dtypes), "uint16"), tuple(shard for _, shard in found))


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds finished shards: an index, or shards that were never ours to index."""
    folder = Path(folder)
    if (folder / INDEX).is_file():
        return True
    return not (folder / JOURNAL).exists() and any(Shard(path.name, 0, 0).split for path in folder.glob("*.bin"))


def load_index(folder: str | os.PathLike[str]) -> ShardIndex:
    """The index of a folder on this machine: read and compared with the files, or made from their headers.

    Raises:
        UserError: a missing folder, an unfinished preparation, or a shard that is missing, foreign or truncated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with lit_gpt prepare TEXT --output {folder}")
    paths = {path.name: path for path in folder.glob("*.bin") if Shard(path.name, 0, 0).split}
    if not (folder / INDEX).is_file():
        if (folder / JOURNAL).exists():
            raise UserError(
                f"{folder}: its preparation was not finished; run the same lit_gpt prepare again, it goes on"
            )
        return index_of(map(describe_file, paths.values()), str(folder))
    index = ShardIndex.from_json((folder / INDEX).read_text("utf-8"), str(folder / INDEX))
    for shard in index.shards:
        if shard.name not in paths:
            raise UserError(f"{folder / shard.name}: missing, but {INDEX} lists it; prepare the folder again")
        compare(shard, index.dtype, *describe_file(paths.pop(shard.name)), str(folder / shard.name))
    for path in paths.values():
        raise UserError(f"{path}: not listed in {INDEX}, so its tokenizer is unknown; move it to a folder of its own")
    return index


def compare(shard: Shard, dtype: str, found_dtype: str, found: Shard, where: str) -> None:
    """Refuse a file that is not what the index says.

    Raises:
        UserError: naming both values.
    """
    told, seen = (dtype, shard.tokens, shard.bytes), (found_dtype, found.tokens, found.bytes)
    if told != seen:
        raise UserError(
            f"{where}: {INDEX} says (dtype, tokens, bytes) = {told}, the file {seen}; prepare the folder again"
        )


# ---------------------------------------------------------------- writing


class ShardWriter:
    """Collects one shard's tokens; made by `write_shard`. Memory stays bounded by the largest `add`."""

    def __init__(self, name: str, file: IO[bytes], dtype: str) -> None:
        self._file, self._dtype = file, dtype
        self._limit = int(np.iinfo(dtype).max)
        self.shard = Shard(name, 0, HEADER_BYTES)

    def add(self, tokens: npt.NDArray[np.integer], documents: int = 0, text_bytes: int = 0) -> None:
        """Append tokens (n,) of any integer dtype, which stand for so many more documents and bytes of text.

        Raises:
            UserError: an id does not fit the shard's dtype, or the header cannot count so many tokens.
        """
        if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) <= self._limit:
            bad = tokens[(tokens < 0) | (tokens > self._limit)][0]
            raise UserError(f"{self.shard.name}: id {bad} does not fit {self._dtype}; name the right tokenizer")
        old = self.shard
        if old.tokens + tokens.size > MAX_TOKENS:
            raise UserError(f"{old.name}: a shard holds at most {MAX_TOKENS} tokens; write more shards")
        data = np.ascontiguousarray(tokens, little_endian(self._dtype))
        self._file.write(data.data)
        self.shard = Shard(
            old.name,
            old.tokens + tokens.size,
            old.bytes + data.nbytes,
            documents=old.documents + documents,
            text_bytes=old.text_bytes + text_bytes,
        )

    def finish(self) -> None:
        """Write the header, which holds the count, and hash the whole file."""
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = (*FORMATS[self._dtype], self.shard.tokens)
        self._file.seek(0)
        self._file.write(header.data)
        self._file.seek(0)
        self.shard = replace(self.shard, sha256=hashlib.file_digest(cast(Any, self._file), "sha256").hexdigest())


@contextmanager
def write_shard(path: str | os.PathLike[str], dtype: str) -> Iterator[ShardWriter]:
    """Write a shard that appears whole or not at all; afterwards the writer's `shard` is its line of the index.

    >>> with write_shard("data/train_000000.bin", "uint16") as writer:       # doctest: +SKIP
    ...     writer.add(np.array([5, 6, 7]), documents=1, text_bytes=12)
    """
    with atomic_write(path, "w+b") as file:
        writer = ShardWriter(Path(path).name, file, dtype)
        file.seek(HEADER_BYTES)
        yield writer
        writer.finish()


# ---------------------------------------------------------------- reading


class TokenStream:
    """All tokens of one split, end to end, as if they were one array.

    It reads with `pread`: pages never count as this process's memory (those of a memory map do, and it grows), and a
    file that shrinks under us is an error and not a SIGBUS. Safe to use from several threads.

    Attributes:
        shards: the files, in order.
        dtype: "uint16" or "uint32".
        documents: how many, as far as the index says (0 without one).
        text_bytes: UTF-8 bytes of the text, as far as the index says.
    """

    def __init__(self, index: ShardIndex, split: str, locate: Callable[[Shard], Path], local: bool) -> None:
        """See `open_tokens`.

        Args:
            index: of the whole folder.
            split: "train", "val" or "test".
            locate: gives a shard's file on this machine, fetching it first if need be.
            local: whether all files are here already.
        """
        self.shards, self.dtype, self._locate, self._local = index.split(split), index.dtype, locate, local
        self.documents = sum(shard.documents for shard in self.shards)
        self.text_bytes = sum(shard.text_bytes for shard in self.shards)
        self._disk = little_endian(index.dtype)
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
        shard, size = self.shards[number], self._disk.itemsize
        first = shard.bytes - (shard.tokens - offset) * size  # headerless or not, the tokens end the file
        with self._lock:
            data = pread_all(self._descriptor(number), count * size, first)
        if len(data) != count * size:
            raise UserError(
                f"{shard.name}: ends before token {offset + count} of {shard.tokens}: truncated; make it again"
            )
        return np.frombuffer(data, self._disk)

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


def pread_all(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset`, fewer only at the file's end (one `pread` gives at most 2 GiB)."""
    data = os.pread(descriptor, count, offset)
    while len(data) < count and (more := os.pread(descriptor, count - len(data), offset + len(data))):
        data += more
    return data


def open_tokens(folder: str | os.PathLike[str], split: str) -> TokenStream:
    """The tokens of one split of a folder on this machine.

    Raises:
        UserError: as `load_index`, and if the folder has no shard of that split.
    """
    return stream_of(load_index(folder), split, str(folder), lambda shard: Path(folder) / shard.name, local=True)


def stream_of(index: ShardIndex, split: str, where: str, locate: Callable[[Shard], Path], local: bool) -> TokenStream:
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


# ---------------------------------------------------------------- checking


def check_folder(
    folder: str | os.PathLike[str],
    vocab_size: int | None = None,
    progress: Callable[[Shard], None] = lambda shard: None,
) -> ShardIndex:
    """Read every byte: headers, counts, hashes, and that ids fit the vocabulary.

    Args:
        folder: on this machine.
        vocab_size: for a folder whose index does not say.
        progress: called after each shard.

    Raises:
        UserError: naming the first shard that is wrong, and how.
    """
    index = load_index(folder)
    for shard in index.shards:
        check_hash(Path(folder) / shard.name, shard)
        one = TokenStream(
            ShardIndex(index.dtype, (shard,)), shard.split or "", lambda shard: Path(folder) / shard.name, True
        )
        for start in range(0, len(one), CHECK_TOKENS):
            tokens = one.read(start, min(CHECK_TOKENS, len(one) - start))
            check_ids(tokens, index.vocab_size or vocab_size, shard.name, start)
        progress(shard)
    return index


def check_hash(path: Path, shard: Shard) -> None:
    """Compare a file with its sha256, where that is known.

    Raises:
        UserError: if they differ.
    """
    if shard.sha256:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != shard.sha256:
            raise UserError(
                f"{path}: sha256 is {found}, {INDEX} says {shard.sha256}: damaged; prepare the folder again"
            )


def check_ids(tokens: Tokens, vocab_size: int | None, where: str, start: int) -> None:
    """Refuse ids that the vocabulary does not have.

    Args:
        tokens: (n,), n > 0.
        vocab_size: None lets everything pass.
        where: the shard's or split's name.
        start: position of the first of the tokens, for the message.

    Raises:
        UserError: naming the first such id and its place.
    """
    if vocab_size is not None and int(tokens.max()) >= vocab_size:
        place = int(np.argmax(tokens >= vocab_size))
        raise UserError(
            f"{where}: token {start + place} is id {tokens[place]}, but the vocabulary ends at {vocab_size - 1}; "
            "name the tokenizer that the shards were made with"
        )
