"""Token shards: the only file that knows their byte format.

A shard is llm.c's: 256 little-endian int32 (magic, version, number of tokens, zeros), then the tokens. nanoGPT's
headerless `train.bin` and `val.bin` are read, too. The loss mask of a shard has the same form, with a byte for each
token. A file belongs to the split that its name mentions: train, val or test. Folders of shards are in
`shard_folder.py`, the tokens of several shards as one array in `token_stream.py`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from lit_gpt.data.index import HEADER_BYTES, INDEX, Shard
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write
from lit_gpt.tokenizer.ids import index_outside

Tokens = npt.NDArray[np.unsignedinteger]

FORMATS = {"uint16": (20240520, 1), "uint32": (20240801, 7), "uint8": (20261122, 1)}  # dtype → (magic, version)
DISK_DTYPES: dict[str, np.dtype[np.unsignedinteger]] = {
    "uint16": np.dtype("<u2"),
    "uint32": np.dtype("<u4"),
    "uint8": np.dtype("u1"),  # of loss masks only
}
MASK_SUFFIX = ".mask"
MAX_TOKENS = 2**31 - 1  # the header counts in int32
SPLITS = ("train", "val", "test")


def dtype_for(vocab_size: int) -> str:
    """The smallest of the two dtypes that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


def parse_shard_header(name: str, head: bytes, size: int, where: str) -> tuple[str, Shard]:
    """What a file's first bytes and size say about it.

    Args:
        name: the file's name.
        head: its first `HEADER_BYTES` bytes, or all of it.
        size: its size in bytes.
        where: its path or address, for error messages.

    Returns:
        The dtype and the shard (without a hash).

    Raises:
        UserError: wrong magic, wrong version, a negative count, or a size that does not fit the count.
    """
    magic, version, tokens = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    dtype = next((dtype for dtype, known in FORMATS.items() if known[0] == magic), None)
    is_mask = name.endswith(MASK_SUFFIX)
    if is_mask and dtype != "uint8":
        raise UserError(f"{where}: wrong magic {magic}, not {FORMATS['uint8'][0]}: not a loss mask; make it again")
    if dtype is None or (dtype == "uint8") != is_mask:
        if name not in {f"{split}.bin" for split in SPLITS}:  # only nanoGPT's own names go without a header
            known_magics = " or ".join(str(FORMATS[each][0]) for each in ("uint16", "uint32"))
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
    if tokens < 0 or size != expected:
        raise UserError(
            f"{where}: {size} bytes, but its header promises {expected}: truncated or damaged; make it again"
        )
    return dtype, Shard(name, tokens, size)


def read_shard_header(path: Path) -> tuple[str, Shard]:
    """`parse_shard_header` for a file on this machine.

    Raises:
        UserError: as that, and if it cannot be read.
    """
    try:
        if not path.is_file():  # to open a named pipe would wait for ever
            raise FileNotFoundError(0, "not there, or not a file")
        with path.open("rb") as file:
            return parse_shard_header(path.name, file.read(HEADER_BYTES), path.stat().st_size, str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); make it readable or prepare it again") from error


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
        bad = index_outside(tokens, self._limit + 1)
        if bad is not None:
            raise UserError(f"{self.shard.name}: id {tokens[bad]} does not fit {self._dtype}; name the right tokenizer")
        old = self.shard
        if old.tokens + tokens.size > MAX_TOKENS:
            raise UserError(f"{old.name}: a shard holds at most {MAX_TOKENS} tokens; write more shards")
        data = np.ascontiguousarray(tokens, DISK_DTYPES[self._dtype])
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


def read_tokens(descriptor: int, shard: Shard, dtype: str, start: int, count: int) -> Tokens:
    """Tokens `start` … `start + count` of one shard, read-only, (count,).

    Args:
        descriptor: of its open file.
        shard: what the file is known to hold.
        dtype: "uint16", "uint32", or "uint8" of a mask.
        start: index of a token in the shard.
        count: how many.

    Raises:
        UserError: if the file has shrunk since it was opened.
    """
    disk = DISK_DTYPES[dtype]
    offset = shard.bytes - (shard.tokens - start) * disk.itemsize  # headerless or not, the tokens end the file
    data = _pread_all(descriptor, count * disk.itemsize, offset)
    if len(data) != count * disk.itemsize:
        raise UserError(f"{shard.name}: ends before token {start + count} of {shard.tokens}: truncated; make it again")
    return np.frombuffer(data, disk)


def _pread_all(descriptor: int, count: int, offset: int) -> bytes:
    """`count` bytes from `offset`, fewer only at the file's end (one `pread` gives at most 2 GiB)."""
    data = os.pread(descriptor, count, offset)
    while len(data) < count and (more := os.pread(descriptor, count - len(data), offset + len(data))):
        data += more
    return data


def file_hash(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def mask_of(shard: Shard) -> Shard:
    """The loss mask beside a shard: `train_000000.mask` for `train_000000.bin`."""
    name = shard.name.removesuffix(".bin") + MASK_SUFFIX
    return Shard(name, shard.tokens, HEADER_BYTES + shard.tokens, shard.mask_sha256)


def check_hash(path: Path, shard: Shard) -> None:
    """Compare a file with its sha256, where that is known.

    Raises:
        UserError: if they differ.
    """
    if shard.sha256 and (found := file_hash(path)) != shard.sha256:
        raise UserError(f"{path}: sha256 is {found}, {INDEX} says {shard.sha256}: damaged; prepare the folder again")
