"""Tokenizers, every one a `tiktoken.Encoding`: named, trained byte-pair merges, characters, bytes.

A `Tokenizer` adds to the encoding what a checkpoint has to remember about it, and is stored as plain JSON with its
ranks inside, so that neither a download nor a pickle is needed to read it back.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from lit_gpt.atomic import atomic_write
from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.tokenizer.json_object import parse_json, read_limited
from lit_gpt.tokenizer.tiktoken_files import named_encoding
from lit_gpt.tokenizer.vocabulary import MAX_TOKENS, build_encoding

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"  # its name beside the shards
FORMAT = "lit_gpt.tokenizer"
EVERY_BYTE = [bytes([value]) for value in range(256)]
# One character is one piece, and a piece that has a rank is one token before any merge is tried.
CHARACTERS = r"(?s:.)"


_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "pattern": (str,),
    "ranks": (str,),
    "specials": (dict,),
    "end_of_text": (str, type(None)),
    "bos_id": (int, type(None)),
    "normalization": (str, type(None)),
    "chat_template": (str, type(None)),
    "hash": (str,),
}
"""What a stored tokenizer holds."""


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A `tiktoken.Encoding` and what has to be known beside it.

    Attributes:
        name: "gpt2", "bpe:4096", "char", …
        encoding: turns text into ids; its ranks are the vocabulary.
        bos_id: the id that has to stand before every prompt, where the model was trained with one.
        normalization: "NFC" where text is normalised before it is encoded; the round trip is then exact for NFC text.
        chat_template: a Jinja template of a converted model.

    >>> tokenizer = get_tokenizer("byte")
    >>> tokenizer.encode("你"), tokenizer.n_vocab, tokenizer.eot_id
    ([228, 189, 160], 257, 256)
    """

    name: str
    encoding: tiktoken.Encoding
    bos_id: int | None = None
    normalization: str | None = None
    chat_template: str | None = None
    end_of_text: str | None = END_OF_TEXT

    def __post_init__(self) -> None:
        if self.normalization not in (None, "NFC"):
            raise UserError(
                f'tokenizer "{self.name}": normalization {brief(self.normalization)} is not known, only "NFC"'
            )
        # Without one of them `encode` dies with a panic that `except Exception` does not catch.
        missing = [value for value in EVERY_BYTE if value not in self.ranks]
        if missing:
            raise UserError(f'tokenizer "{self.name}" lacks {len(missing)} of the 256 bytes, {missing[0]!r} first')
        if self.bos_id is not None and not 0 <= self.bos_id < self.n_vocab:
            raise UserError(f'tokenizer "{self.name}": bos_id {brief(self.bos_id)} is none of its {self.n_vocab} ids')

    @classmethod
    def build(
        cls, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], **details: Any
    ) -> Tokenizer:
        """A tokenizer from its parts.

        Args:
            name: what it is called.
            pattern: regular expression whose matches are encoded one by one.
            ranks: token → id; of two neighbours the pair with the lowest id is merged first.
            specials: name → id of the tokens that no text becomes.
            details: the remaining fields of `Tokenizer`.

        Raises:
            UserError: for parts of which no encoding can be made.
        """
        return cls(name, build_encoding(name, pattern, ranks, specials), **details)

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
    def eot_id(self) -> int | None:
        """The id that separates documents, if there is one."""
        return self.specials.get(self.end_of_text) if self.end_of_text else None

    @property
    def n_vocab(self) -> int:
        """The largest id + 1; ids may have gaps below it."""
        return self.encoding.max_token_value + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides which ids a text becomes: pattern, ranks, specials, normalization."""
        return _hash(self.pattern, self._ranks_text, self.specials, self.normalization)

    def encode(self, text: str) -> list[int]:
        """Text to ids. The text of a special token is plain text; a lone surrogate becomes U+FFFD."""
        return self._encode(self._normalized(text)).tolist()

    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but the name of a special token is that token: for the text that a chat template makes."""
        if not self.specials:
            return self.encode(text)
        ids: list[int] = []
        for part in self._special_names.split(text):
            if part in self.specials:
                ids.append(self.specials[part])
            elif part:
                ids += self.encode(part)
        return ids

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As `encode`, as uint32 (T,), read-only, in a ninth of the memory of a list."""
        return self._encode(self._normalized(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids to bytes; specials and ids outside the vocabulary give none."""
        values = ids.tolist() if isinstance(ids, np.ndarray) else ids
        return b"".join([self._bytes_of.get(int(value), b"") for value in values])

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id; b"" for specials and ids outside the vocabulary."""
        return self._bytes_of.get(int(token), b"")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, the ranks inside as the text of a `.tiktoken` file.

        One string and not 50,000: a checkpoint's safe reader handles each object by itself.
        """
        return {
            "format": FORMAT,
            "version": 1,
            "name": self.name,
            "pattern": self.pattern,
            "ranks": self._ranks_text,
            "specials": dict(self.specials),
            "end_of_text": self.end_of_text,
            "bos_id": self.bos_id,
            "normalization": self.normalization,
            "chat_template": self.chat_template,
            "hash": self.hash,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "tokenizer") -> Tokenizer:
        """The inverse of `to_dict`.

        Raises:
            UserError: not a tokenizer of ours, or damaged; `origin` says where it came from.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{origin}: not a tokenizer of lit_gpt; lit_gpt convert reads other projects' tokenizers")
        if values.get("version") != 1:
            raise UserError(f"{origin}: version {brief(values.get('version'))} of the format; this lit_gpt reads 1")
        for key, types in _FIELDS.items():
            value = values.get(key)
            if key not in values or not isinstance(value, types) or isinstance(value, bool):
                raise UserError(f"{origin}: damaged, its {key} is {brief(value)}; write it again")
        try:
            details = {key: values[key] for key in ("end_of_text", "bos_id", "normalization", "chat_template")}
            ranks = _parse_ranks(values["ranks"])
            tokenizer = cls.build(values["name"], values["pattern"], ranks, values["specials"], **details)
            found = _hash(values["pattern"], values["ranks"], values["specials"], values["normalization"])
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        except ValueError as error:  # of base64, of a number, of a lone surrogate
            raise UserError(f"{origin}: damaged ({' '.join(str(error).split())[:200]}); write it again") from None
        if found != values.get("hash"):
            raise UserError(f"{origin}: damaged, its content does not have the hash it names; write it again")
        tokenizer.__dict__["hash"] = found  # so that the property does not compute it again
        return tokenizer

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict` as JSON."""
        with atomic_write(path, "w") as file:
            json.dump(self.to_dict(), file, ensure_ascii=False, indent=1)
            file.write("\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read what `save` wrote; `path` is the file or the folder that holds `tokenizer.json`.

        The file is read here and not by tiktoken, whose cache goes by path and would answer with an old vocabulary.

        Raises:
            UserError: missing, unreadable or damaged.
        """
        path = Path(path)
        path = path / TOKENIZER_FILE if path.is_dir() else path
        try:
            values = parse_json(read_limited(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; name a {TOKENIZER_FILE} written by lit_gpt") from error
        except ValueError as error:
            raise UserError(
                f"{path}: not JSON ({str(error)[:200]}); name a {TOKENIZER_FILE} written by lit_gpt"
            ) from error
        return cls.from_dict(values, str(path))

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

    def _normalized(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.normalization else text

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


class TextStream:
    """Text from tokens as they come: a character appears once all its bytes have.

    >>> stream = TextStream(get_tokenizer("byte"))
    >>> stream.feed([228, 189]), stream.feed([160])
    ('', '你')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Iterable[int] | bytes) -> str:
        """The characters that are complete now, after these further ids or bytes."""
        data = tokens if isinstance(tokens, bytes) else self._tokenizer.decode_bytes(tokens)
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The end: bytes that still wait for the rest of their character become U+FFFD."""
        return self._decoder.decode(b"", final=True)


def get_tokenizer(spec: str) -> Tokenizer:
    """A tokenizer that needs no text: "byte", a name that tiktoken knows, or the path of a saved one.

    Raises:
        UserError: unknown, damaged, to be trained on text, or not here and not to be downloaded.
    """
    if spec == "byte":
        ranks = {token: value for value, token in enumerate(EVERY_BYTE)}
        return Tokenizer.build("byte", CHARACTERS, ranks, {END_OF_TEXT: 256})
    if is_trained(spec):
        raise UserError(f'tokenizer "{spec}" is made from text: name the {TOKENIZER_FILE} that lit_gpt prepare wrote')
    names = tiktoken.list_encoding_names()
    if spec in names:
        return Tokenizer(spec, named_encoding(spec))
    if os.path.exists(spec) or os.sep in spec or spec.endswith(".json"):
        return Tokenizer.load(spec)
    raise UserError(f'unknown tokenizer "{spec}": {nearest(spec, ["byte", "char", "bpe:4096", *names])}')


def is_trained(spec: str) -> bool:
    """Whether `spec` is "char" or "bpe:N", which `train.train_tokenizer` makes from text.

    Raises:
        UserError: "bpe:" with something else than a size of at least 257, its 256 bytes and the end-of-text token.
    """
    if spec.startswith("bpe:") and not (spec[4:].isascii() and spec[4:].isdigit() and int(spec[4:]) >= 257):
        raise UserError(f'tokenizer "{spec}": write bpe:N with a vocabulary of N >= 257 tokens, such as bpe:4096')
    return spec == "char" or spec.startswith("bpe:")


def byte_alphabet() -> dict[str, int]:
    """The letters in which GPT-2's files, and those of `tokenizers`, write bytes: letter → byte.

    A printable byte of Latin-1 is its own letter; the others are the letters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(hidden)}


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
