"""`index.json`: which shards a folder has, in order, and how their ids were made."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeGuard

from lit_gpt.data.small_json import MAX_JSON_BYTES, parse_small_json, shown
from lit_gpt.errors import UserError
from lit_gpt.files.atomic import atomic_write

INDEX = "index.json"
INDEX_VERSION = 1
MASKED_VERSION = 2  # of folders that hold loss masks, which an earlier program would read as text
DTYPES = ("uint16", "uint32")
HEADER_BYTES = 1024  # of a shard; nanoGPT's have none
REMEDY = "prepare the folder again"
TEXT = "text"
_OF_MASKED = ("format", "template_sha256")  # fields that an index of text does not have
_FILE_NAME = re.compile(r"[^/\\]{1,200}\.bin")


@dataclass(frozen=True)
class Shard:
    """One file of tokens. Where no index describes it, only `name`, `tokens` and `bytes` are known."""

    name: str
    tokens: int
    bytes: int  # of the file, header included
    sha256: str = ""  # of the file, header included
    documents: int = 0
    text_bytes: int = 0  # UTF-8 bytes of the text that the tokens stand for
    mask_sha256: str = ""  # of the loss mask beside it, which has its name but for the suffix; "" where there is none

    def to_json(self) -> dict[str, Any]:
        """Its JSON object; a shard of text has nothing about a mask, which earlier programs do not know."""
        values = asdict(self)
        if not self.mask_sha256:
            del values["mask_sha256"]
        return values

    @property
    def split(self) -> str | None:
        """The split that the name mentions, e.g. "val" for `fineweb_val_000000.bin`."""
        found = re.search(r"(?:^|[_.-])(train|val|test)(?:id|idation)?(?=[_.-])", self.name)
        return found[1] if found else None


@dataclass(frozen=True)
class ShardIndex:
    """What `index.json` says: the shards of a folder, in order, and how their ids were made."""

    dtype: str  # "uint16" or "uint32"
    shards: tuple[Shard, ...]
    tokenizer: str | None = None  # its name; None where no index says
    tokenizer_hash: str | None = None
    vocab_size: int | None = None  # every id is below it
    eot_id: int | None = None
    eot_position: str | None = None  # the end-of-text id stands "before" or "after" each document
    format_version: int = INDEX_VERSION
    format: str = TEXT  # of the data; all but text have a loss mask beside each shard
    template_sha256: str | None = None  # of the chat template that made the ids, UTF-8

    @property
    def masked(self) -> bool:
        """Whether a loss mask lies beside each shard."""
        return self.format_version >= MASKED_VERSION

    def split(self, split: str) -> tuple[Shard, ...]:
        """The shards of "train", "val" or "test", in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """Canonical text: the same index is the same bytes."""
        values = asdict(self) | {"shards": [shard.to_json() for shard in self.shards]}
        if not self.masked:
            values = {key: value for key, value in values.items() if key not in _OF_MASKED}
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `index.json`, whole. It comes last: with it the folder is complete.

        Raises:
            UserError: so many shards that the index would be too large to be read.
        """
        text = self.to_json()
        if len(text.encode()) > MAX_JSON_BYTES:
            raise UserError(f"{folder}: {len(self.shards)} shards are too many for {INDEX}; raise --shard_tokens")
        with atomic_write(Path(folder) / INDEX, "w") as file:
            file.write(text)

    @classmethod
    def from_json(cls, data: bytes, where: str) -> ShardIndex:
        """Read `to_json`'s text.

        Args:
            data: the file's content, UTF-8.
            where: its path or address, for error messages.

        Raises:
            UserError: if it is not such an index, or of a later version.
        """
        values = parse_small_json(data, where, REMEDY)
        try:
            version = values["format_version"]
            if not is_count(version):
                raise ValueError(f"format version {_shown(version)}")
            if version > MASKED_VERSION:
                raise UserError(f"{where}: format version {version} is newer than this program's; upgrade it")
            values["shards"] = tuple(shard_from_json(shard) for shard in values["shards"])
            names = (*_OF_ALL, *_OF_MASKED) if version >= MASKED_VERSION else _OF_ALL
            index = cls(**{name: values[name] for name in names})
        except UserError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not an index of token shards ({shown(error)}); {REMEDY}") from error
        problem = _problem(index)
        if problem is not None:
            raise UserError(f"{where}: {problem}; {REMEDY}")
        return index


_OF_ALL = tuple(field.name for field in fields(ShardIndex) if field.name not in _OF_MASKED)


def is_count(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is a number of things: an integer from 0 to below 2^63."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def shard_from_json(values: dict[str, Any]) -> Shard:
    """A shard from its JSON object; `Any`, since nothing is known of it yet.

    Raises:
        TypeError: it has other keys.
        ValueError: a value that no shard can have; the message names it.
    """
    shard = Shard(**values)
    name = shard.name
    if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or not name.isprintable():  # a server's, perhaps
        raise ValueError(f"{_shown(name)} is not a file name ending in .bin")
    for key in ("tokens", "bytes", "documents", "text_bytes"):
        if not is_count(values.get(key, 0)):
            raise ValueError(f"{name}: {key} {_shown(values[key])} is no count")
    for key in ("sha256", "mask_sha256"):
        if not _is_hash(values.get(key, ""), r"([0-9a-f]{64})?"):
            raise ValueError(f"{name}: {key} {_shown(values[key])} is no hash")
    return shard


def _is_hash(value: object, pattern: str = r"[0-9a-f]{64}") -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _problem(index: ShardIndex) -> str | None:
    """The first value of an index that cannot be, in words."""
    if index.dtype not in DTYPES:
        return f"dtype {_shown(index.dtype)} is not one of {', '.join(DTYPES)}"
    item, seen = 2 if index.dtype == "uint16" else 4, set[str]()
    for shard in index.shards:
        if shard.name in seen:
            return f'"{shard.name}" is listed twice'
        if shard.bytes - shard.tokens * item not in (0, HEADER_BYTES):
            return f"{shard.name}: {shard.tokens} tokens of {index.dtype} are not {shard.bytes} bytes"
        if bool(shard.mask_sha256) != index.masked or (index.masked and not shard.sha256):
            return f"{shard.name}: the hashes of its tokens and its mask are not those of format {_shown(index.format)}"
        seen.add(shard.name)
    if index.vocab_size is not None and not (is_count(index.vocab_size) and 0 < index.vocab_size <= 1 << (8 * item)):
        return f"vocab_size {_shown(index.vocab_size)} is not one of {index.dtype}"
    if index.eot_id is not None and not (is_count(index.eot_id) and index.eot_id < (index.vocab_size or 1 << 32)):
        return f"eot_id {_shown(index.eot_id)} is not in the vocabulary"
    if index.eot_position not in (None, "before", "after"):
        return f"eot_position {_shown(index.eot_position)} is neither before nor after"
    if index.masked and not (isinstance(index.format, str) and re.fullmatch("[a-z]{1,20}", index.format)):
        return f"format {_shown(index.format)} is no name"
    if index.masked and not _is_hash(index.template_sha256):
        return f"template_sha256 {_shown(index.template_sha256)} is no hash"
    for key in ("tokenizer", "tokenizer_hash"):
        value = getattr(index, key)
        if value is not None and not (isinstance(value, str) and value.isprintable() and len(value) < 1000):
            return f"{key} {_shown(value)} is not a line of text"
    return None


def _shown(value: object) -> str:
    """A value for a message, on one line and not long."""
    return json.dumps(value)[:60]
