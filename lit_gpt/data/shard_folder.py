"""Folders of token shards on this machine: their index, whether they are complete, and checks of every byte.

`prepare` writes an `index.json` beside its shards. Folders without one are read as they are: llm.c's public sets, and
nanoGPT's.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lit_gpt.data.index import INDEX, REMEDY, Shard, ShardIndex
from lit_gpt.data.masks import MASK_DTYPE, check_marks, mask_index
from lit_gpt.data.shards import Tokens, check_hash, mask_of, read_shard_header
from lit_gpt.data.small_json import read_limited
from lit_gpt.data.token_stream import TokenStream, check_ids, open_split
from lit_gpt.errors import UserError
from lit_gpt.files.locks import Lock

STATE_FILE = "prepare.json"  # the state of a preparation that is under way; beside an index it means nothing
CHECK_TOKENS = 1 << 22  # read at a time when whole shards are checked


def index_from_headers(described: Iterable[tuple[str, Shard]], where: str) -> ShardIndex:
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


def has_index(folder: Path) -> bool:
    """Whether there is an index, be it one that cannot be read: its shards are not taken for shards without one."""
    return os.path.lexists(folder / INDEX)


def is_prepared(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds finished shards: an index, or shards that were never ours to index."""
    folder = Path(folder)
    if has_index(folder):
        return True
    return not (folder / STATE_FILE).exists() and any(Shard(path.name, 0, 0).split for path in folder.glob("*.bin"))


def read_lock(folder: str | os.PathLike[str]) -> Lock:
    """A reader's lock on a folder of shards, held as long as the object: `prepare` does not replace them under it.

    Raises:
        UserError: `prepare` is writing to the folder.
    """
    return Lock(folder, f"{folder}: lit_gpt prepare is writing to it; wait for it to end", shared=True)


def load_index(folder: str | os.PathLike[str]) -> ShardIndex:
    """The index of a folder on this machine: read and compared with the files, or made from their headers.

    Raises:
        UserError: a missing folder, an unfinished preparation, or a shard that is missing, foreign or truncated.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; make it with lit_gpt prepare TEXT --output {folder}")
    paths = {path.name: path for path in folder.glob("*.bin") if Shard(path.name, 0, 0).split}
    if not has_index(folder):
        if (folder / STATE_FILE).exists():
            raise UserError(
                f"{folder}: its preparation was not finished; run the same lit_gpt prepare again, it goes on"
            )
        return index_from_headers(map(read_shard_header, paths.values()), str(folder))
    index = read_index(folder)
    for shard in index.shards:
        if shard.name not in paths:
            raise UserError(f"{folder / shard.name}: missing, but {INDEX} lists it; prepare the folder again")
        check_against_index(shard, index.dtype, *read_shard_header(paths.pop(shard.name)), str(folder / shard.name))
    for mask in mask_index(index).shards if index.masked else ():
        where = folder / mask.name
        if not where.exists():
            raise UserError(f"{where}: the loss mask is missing, but {INDEX} lists it; prepare the folder again")
        check_against_index(mask, MASK_DTYPE, *read_shard_header(where), str(where))
    for path in paths.values():
        raise UserError(f"{path}: not listed in {INDEX}, so its tokenizer is unknown; move it to a folder of its own")
    return index


def read_index(folder: Path) -> ShardIndex:
    """The index of a folder that has one, not compared with the files.

    Raises:
        UserError: it cannot be read, or is no index.
    """
    return ShardIndex.from_json(read_limited(folder / INDEX, REMEDY), str(folder / INDEX))


def check_against_index(shard: Shard, dtype: str, found_dtype: str, found: Shard, where: str) -> None:
    """Refuse a file that is not what the index says.

    Raises:
        UserError: naming both values.
    """
    told, seen = (dtype, shard.tokens, shard.bytes), (found_dtype, found.tokens, found.bytes)
    if told != seen:
        raise UserError(
            f"{where}: {INDEX} says (dtype, tokens, bytes) = {told}, the file {seen}; prepare the folder again"
        )


def open_tokens(folder: str | os.PathLike[str], split: str) -> TokenStream:
    """The tokens of one split of a folder on this machine.

    Raises:
        UserError: as `load_index`, and if the folder has no shard of that split.
    """
    return open_local_split(load_index(folder), split, folder)


def open_local_split(index: ShardIndex, split: str, folder: str | os.PathLike[str]) -> TokenStream:
    """The tokens of one split of a folder on this machine, under a reader's lock as long as the stream exists.

    Args:
        index: of the folder, loaded before.
        split: "train", "val" or "test".
        folder: of the shards.

    Raises:
        UserError: no shard of that split; or `prepare` is writing to the folder, or has written since `index` was read.
    """
    folder = Path(folder)
    stream = open_split(index, split, str(folder), lambda shard: folder / shard.name, local=True)
    stream.lock = read_lock(folder)
    if has_index(folder) and read_index(folder) != index:
        raise UserError(f"{folder}: lit_gpt prepare has replaced its shards just now; run this again")
    return stream


def check_folder(
    folder: str | os.PathLike[str],
    vocab_size: int | None = None,
    on_tokens: Callable[[Tokens], None] = lambda tokens: None,
    on_shard: Callable[[Shard], None] = lambda shard: None,
    on_mask: Callable[[Tokens], None] = lambda mask: None,
) -> ShardIndex:
    """Read every byte: headers, counts, hashes, that ids fit the vocabulary, and that masks are masks.

    Args:
        folder: on this machine.
        vocab_size: for a folder whose index does not say.
        on_tokens: called with each part of a shard, when its ids were found to be in the vocabulary.
        on_shard: called after each shard.
        on_mask: called with each part of a shard's mask, before that.

    Raises:
        UserError: naming the first shard that is wrong, and how.
    """
    index = load_index(folder)
    for shard in index.shards:
        check_hash(Path(folder) / shard.name, shard)
        for tokens, start in _parts(Path(folder), shard, index.dtype):
            check_ids(tokens, index.vocab_size or vocab_size, shard.name, start)
            on_tokens(tokens)
        if index.masked:
            mask = mask_of(shard)
            check_hash(Path(folder) / mask.name, mask)
            for marks, start in _parts(Path(folder), mask, MASK_DTYPE):
                check_marks(marks, mask, start)
                on_mask(marks)
        on_shard(shard)
    return index


def _parts(folder: Path, shard: Shard, dtype: str) -> Iterator[tuple[Tokens, int]]:
    """The tokens of one shard, or the bytes of a mask, in parts; each with the position of its first."""
    stream = TokenStream(ShardIndex(dtype, (shard,)), shard.split or "", lambda shard: folder / shard.name, True)
    for start in range(0, len(stream), CHECK_TOKENS):
        yield stream.read(start, min(CHECK_TOKENS, len(stream) - start)), start
