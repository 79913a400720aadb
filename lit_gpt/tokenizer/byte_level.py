"""Tokenizers of bytes, every one a `tiktoken.Encoding`: named, trained byte-pair merges, characters, bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, repeat
from typing import Any, ClassVar

import numpy as np
import tiktoken

from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.tokenizer import EVERY_BYTE, EncodedParts, Tokenizer
from lit_gpt.tokenizer.vocabulary import MAX_TOKENS, build_encoding


@dataclass(frozen=True, eq=False, kw_only=True)
class ByteLevelTokenizer(Tokenizer):
    """A `tiktoken.Encoding` and what has to be known beside it.

    Attributes:
        encoding: turns text into ids; its ranks are the vocabulary.
    """

    VERSION: ClassVar[int] = 1
    FIELDS: ClassVar[dict[str, tuple[type, ...]]] = {**Tokenizer.FIELDS, "pattern": (str,), "ranks": (str,)}

    encoding: tiktoken.Encoding

    def __post_init__(self) -> None:
        if self.normalization not in (None, "NFC"):
            raise UserError(
                f'tokenizer "{self.name}": normalization {brief(self.normalization)} is not known, only "NFC"'
            )
        # Without one of them `encode` dies with a panic that `except Exception` does not catch.
        missing = [value for value in EVERY_BYTE if value not in self.ranks]
        if missing:
            raise UserError(f'tokenizer "{self.name}" lacks {len(missing)} of the 256 bytes, {missing[0]!r} first')
        super().__post_init__()

    @classmethod
    def build(
        cls, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], **details: Any
    ) -> ByteLevelTokenizer:
        """As `Tokenizer.build`."""
        return cls(name=name, encoding=build_encoding(name, pattern, ranks, specials), **details)

    def __reduce__(self) -> tuple[Any, ...]:
        details = {"bos_id": self.bos_id, "normalization": self.normalization, "chat_template": self.chat_template}
        details["end_of_text"] = self.end_of_text
        return _rebuild, (self.name, self.pattern, self.ranks, self.specials, details)

    @property
    def pattern(self) -> str:
        """The regular expression that cuts text into pieces."""
        return self.encoding._pat_str

    @property
    def ranks(self) -> dict[bytes, int]:
        """Token → id, specials not included."""
        return self.encoding._mergeable_ranks

    @property
    def specials(self) -> dict[str, int]:
        """Name → id of the special tokens."""
        return self.encoding._special_tokens

    @property
    def n_vocab(self) -> int:
        """The largest id + 1; ids may have gaps below it."""
        return self.encoding.max_token_value + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides which ids a text becomes: pattern, ranks, specials, normalization."""
        return _hash(self.pattern, self._ranks_text, self.specials, self.normalization)

    def encode_with_specials(self, text: str) -> list[int]:
        """As `Tokenizer.encode_with_specials`."""
        if not self.specials:
            return self.encode(text)
        ids: list[int] = []
        for part in self._special_names.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
            elif part:
                ids += self.encode(part)
        return ids

    def encode_parts(self, parts: Sequence[str | int]) -> EncodedParts:
        """As `Tokenizer.encode_parts`."""
        names = {number: name for name, number in self.specials.items()}
        ids: list[int] = []
        lengths: list[int] = []  # in bytes
        for part in parts:
            if isinstance(part, int):
                ids.append(part)
                lengths.append(len(names[part].encode()))
            else:
                new = self.encode(part)
                ids += new
                lengths += [len(self._bytes_of[token]) for token in new]
        whole = "".join(names[part] if isinstance(part, int) else part for part in parts)
        return EncodedParts(ids, *_characters(whole.encode(), lengths))

    def normalized(self, text: str) -> str:
        """As `Tokenizer.normalized`."""
        return unicodedata.normalize("NFC", text) if self.normalization else text

    def with_specials(self, names: Sequence[str], chat_template: str | None) -> ByteLevelTokenizer:
        """As `Tokenizer.with_specials`."""
        new = [name for name in names if name not in self.specials]
        specials = self.specials | {name: self.n_vocab + i for i, name in enumerate(new)}
        details = {"bos_id": self.bos_id, "normalization": self.normalization, "end_of_text": self.end_of_text}
        return self.build(self.name, self.pattern, self.ranks, specials, chat_template=chat_template, **details)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As `encode`, as uint32 (T,), read-only, in a ninth of the memory of a list."""
        return self._encode(self.normalized(text))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to bytes; specials and ids outside the vocabulary give none."""
        values = ids.tolist() if isinstance(ids, np.ndarray) else map(int, ids)
        return b"".join(map(self._bytes_of.get, values, repeat(b"")))

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; b"" for specials and ids outside the vocabulary."""
        return self._bytes_of.get(int(token), b"")

    def _stored_content(self) -> dict[str, str]:
        """The pattern, and the ranks as the text of a `.tiktoken` file."""
        return {"pattern": self.pattern, "ranks": self._ranks_text}

    @classmethod
    def from_stored(cls, values: dict[str, Any], details: dict[str, Any]) -> ByteLevelTokenizer:
        """As `Tokenizer.from_stored`."""
        tokenizer = cls.build(
            values["name"], values["pattern"], _parse_ranks(values["ranks"]), values["specials"], **details
        )
        found = _hash(values["pattern"], values["ranks"], values["specials"], values["normalization"])
        tokenizer.__dict__["hash"] = found  # of the text, so that the property does not write it anew
        return tokenizer

    def _encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self._encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        except ValueError:  # a run of a million spaces is more than the regular expression's stack
            if len(text) < 2:
                raise UserError(
                    f'tokenizer "{self.name}" cannot encode {text!r}: check its regular expression'
                ) from None
            middle = len(text) // 2
            return np.concatenate([self._encode(text[:middle]), self._encode(text[middle:])])

    @cached_property
    def _ranks_text(self) -> str:
        """Lines of base64 token, space, id, ordered by id."""
        ordered = sorted(self.ranks.items(), key=lambda item: item[1])
        return "\n".join(f"{base64.b64encode(token).decode()} {rank}" for token, rank in ordered)

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n characters is at least n / `longest_token` tokens."""
        return max(map(len, self.ranks))

    @cached_property
    def _special_names(self) -> re.Pattern[str]:
        """Matches a special token's name, the longest of those that begin alike."""
        names = sorted(filter(None, self.specials), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})")

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {rank: token for token, rank in self.ranks.items()}


def _characters(data: bytes, lengths: list[int]) -> tuple[list[int], list[int]]:
    """The first and the past-the-last character of pieces of UTF-8 that are so many bytes long, one after another."""
    ends = list(accumulate(lengths))
    starts = [end - length for end, length in zip(ends, lengths)]
    if data.isascii():
        return starts, ends
    character = np.cumsum((np.frombuffer(data, np.uint8) & 0xC0) != 0x80)  # of each byte, from 1 on
    return (character[starts] - 1).tolist(), character[np.array(ends) - 1].tolist()


def _rebuild(
    name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], details: dict[str, Any]
) -> ByteLevelTokenizer:
    """A copy in another process."""
    return ByteLevelTokenizer.build(name, pattern, ranks, specials, **details)


def _hash(pattern: str, ranks: str, specials: dict[str, int], normalization: str | None) -> str:
    deciding = [pattern, ranks, sorted(specials.items()), normalization]
    return hashlib.sha256(json.dumps(deciding, separators=(",", ":")).encode()).hexdigest()


def _parse_ranks(text: str) -> dict[bytes, int]:
    """Token → id. Raises ValueError for another text than `_ranks_text` makes."""
    if text.count("\n") > MAX_TOKENS:
        raise ValueError(f"more than {MAX_TOKENS} tokens")
    pairs = [line.split() for line in text.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in pairs}
    if len(ranks) < len(pairs):
        raise ValueError(f"{len(pairs) - len(ranks)} of its tokens are there twice")
    return ranks
