"""`index.json`: which shards a folder has, in order, and how their ids were made."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lit_gpt.atomic import atomic_write
from lit_gpt.errors import UserError

INDEX = "index.json"
INDEX_VERSION = 1
DTYPES = ("uint16", "uint32")


@dataclass(frozen=True)
class Shard:
    """One file of tokens. Where no index describes it, only `name`, `tokens` and `bytes` are known."""

    name: str
    tokens: int
    bytes: int  # of the file, header included
    sha256: str = ""  # of the file, header included
    documents: int = 0
    text_bytes: int = 0  # UTF-8 bytes of the text that the tokens stand for

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

    def split(self, split: str) -> tuple[Shard, ...]:
        """The shards of "train", "val" or "test", in order."""
        return tuple(shard for shard in self.shards if shard.split == split)

    def to_json(self) -> str:
        """Canonical text: the same index is the same bytes."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `index.json`, whole. It comes last: with it the folder is complete."""
        with atomic_write(Path(folder) / INDEX, "w") as file:
            file.write(self.to_json())

    @classmethod
    def from_json(cls, text: str, where: str) -> ShardIndex:
        """Read `to_json`'s text.

        Args:
            text: the file's content.
            where: its path or address, for error messages.

        Raises:
            UserError: if it is not such an index, or of a later version.
        """
        try:
            values = json.loads(text)
            if values["format_version"] > INDEX_VERSION:
                raise UserError(
                    f"{where}: format version {values['format_version']} is newer than this program's; upgrade it"
                )
            values["shards"] = tuple(Shard(**shard) for shard in values["shards"])
            index = cls(**{field.name: values[field.name] for field in fields(cls)})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise UserError(f"{where}: not an index of token shards ({error}); prepare the folder again") from error
        for shard in index.shards:
            if not shard.name.endswith(".bin") or Path(shard.name).name != shard.name:  # it may come from a server
                raise UserError(f'{where}: "{shard.name}" is not a file name ending in .bin; prepare the folder again')
        if index.dtype not in DTYPES:
            raise UserError(
                f'{where}: dtype "{index.dtype}" is not one of {", ".join(DTYPES)}; prepare the folder again'
            )
        return index
