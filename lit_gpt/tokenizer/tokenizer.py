"""Tokenizers: text to ids and back. One interface, and the kinds behind it.

A tokenizer is stored as plain JSON with its vocabulary inside, so that neither a download nor a pickle is needed to
read it back.
"""

from __future__ import annotations

import codecs
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import tiktoken

from lit_gpt.errors import UserError, brief, nearest
from lit_gpt.files.atomic import atomic_write
from lit_gpt.tokenizer.json_object import parse_json, read_limited
from lit_gpt.tokenizer.tiktoken_files import named_encoding

END_OF_TEXT = "<|endoftext|>"
TOKENIZER_FILE = "tokenizer.json"  # its name beside the shards
FORMAT = "lit_gpt.tokenizer"
EVERY_BYTE = [bytes([value]) for value in range(256)]
# One character is one piece, and a piece that has a rank is one token before any merge is tried.
CHARACTERS = r"(?s:.)"
_BYTE_LEVEL = 1
_KINDS = {
    _BYTE_LEVEL: "lit_gpt.tokenizer.byte_level:ByteLevelTokenizer",
    2: "lit_gpt.tokenizer.byte_fallback:ByteFallbackTokenizer",
}
"""Version of the stored format → the class that reads it, imported when there is one to read."""


class EncodedParts(NamedTuple):
    """The ids of a rendering, and the characters [start, end) that each of them stands for.

    The ids of one character that is several tokens all have that character.
    """

    ids: list[int]
    starts: list[int]
    ends: list[int]


def _kind(version: int) -> Any:
    module, _, name = _KINDS[version].partition(":")
    return getattr(import_module(module), name)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tokenizer(ABC):
    """Text ↔ ids, and what a checkpoint has to remember about that.

    Attributes:
        name: "gpt2", "bpe:4096", "char", …
        bos_id: the id that has to stand before every prompt, where the model was trained with one.
        normalization: None where the bytes of the tokens are those of the text. "NFC" where text is normalised before
            it is encoded; the round trip is then exact for NFC text. "spaces" where spaces are written as another
            character first, which that one becomes too, and one may be put in front.
        chat_template: a Jinja template, for models that answer.
        end_of_text: the name of the special token that separates documents, if there is one.

    >>> tokenizer = get_tokenizer("byte")
    >>> tokenizer.encode("你"), tokenizer.n_vocab, tokenizer.eot_id
    ([228, 189, 160], 257, 256)
    """

    VERSION: ClassVar[int]
    FIELDS: ClassVar[dict[str, tuple[type, ...]]] = {
        "name": (str,),
        "specials": (dict,),
        "end_of_text": (str, type(None)),
        "bos_id": (int, type(None)),
        "normalization": (str, type(None)),
        "chat_template": (str, type(None)),
        "hash": (str,),
    }

    name: str
    bos_id: int | None = None
    normalization: str | None = None
    chat_template: str | None = None
    end_of_text: str | None = END_OF_TEXT

    def __post_init__(self) -> None:
        if self.bos_id is not None and not 0 <= self.bos_id < self.n_vocab:
            raise UserError(f'tokenizer "{self.name}": bos_id {brief(self.bos_id)} is none of its {self.n_vocab} ids')

    @classmethod
    def build(
        cls, name: str, pattern: str, ranks: dict[bytes, int], specials: dict[str, int], **details: Any
    ) -> Tokenizer:
        """A tokenizer of bytes from its parts.

        Args:
            name: what it is called.
            pattern: regular expression whose matches are encoded one by one.
            ranks: token → id; of two neighbours the pair with the lowest id is merged first.
            specials: name → id of the tokens that no text becomes.
            details: the remaining fields of `Tokenizer`.

        Raises:
            UserError: for parts of which no encoding can be made.
        """
        return _kind(_BYTE_LEVEL).build(name, pattern, ranks, specials, **details)

    @property
    def pattern(self) -> str:
        """The regular expression of a tokenizer of bytes. Raises UserError for another kind."""
        raise UserError(f'tokenizer "{self.name}" cuts text by no regular expression: choose one with byte-level BPE')

    @property
    def ranks(self) -> dict[bytes, int]:
        """Token → id of a tokenizer of bytes, specials not included. Raises UserError for another kind."""
        raise UserError(f'tokenizer "{self.name}" is no byte-level BPE, which is needed here: choose one that is')

    @property
    @abstractmethod
    def specials(self) -> dict[str, int]:
        """Name → id of the special tokens."""

    @property
    def eot_id(self) -> int | None:
        """The id that separates documents, if there is one."""
        return self.specials.get(self.end_of_text) if self.end_of_text else None

    @property
    @abstractmethod
    def n_vocab(self) -> int:
        """The largest id + 1; ids may have gaps below it."""

    @property
    @abstractmethod
    def hash(self) -> str:
        """SHA-256 of all that decides which ids a text becomes."""

    @property
    @abstractmethod
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n characters is at least n / `longest_token` tokens."""

    def encode(self, text: str) -> list[int]:
        """Text to ids. The text of a special token is plain text; a lone surrogate becomes U+FFFD."""
        return self.encode_to_numpy(text).tolist()

    @abstractmethod
    def encode_with_specials(self, text: str) -> list[int]:
        """As `encode`, but the name of a special token is that token: for the text that a chat template makes."""

    @abstractmethod
    def encode_parts(self, parts: Sequence[str | int]) -> EncodedParts:
        """Ids of a rendering that has been taken apart at its special tokens, as it would be encoded whole.

        Args:
            parts: texts, in which nothing is special, and ids of special tokens. No two texts in a row, no lone
                surrogates, and each as `normalized` gives it.

        Returns:
            The ids with their characters, counted as if each special token were its name.
        """

    def normalized(self, text: str) -> str:
        """The text that is encoded in place of `text`, where that is decided before the text is cut up."""
        return text

    @abstractmethod
    def with_specials(self, names: Sequence[str], chat_template: str | None) -> Tokenizer:
        """The same with this chat template, and those of these special tokens appended that it has not.

        Raises:
            UserError: if text can become one of them.
        """

    @abstractmethod
    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As `encode`, as uint32 (T,), which may be read-only."""

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @abstractmethod
    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids of a whole text to bytes; specials and ids outside the vocabulary give none."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id inside a text; b"" for specials and ids outside the vocabulary."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, few and long: a checkpoint's safe reader handles each object by itself."""
        return {
            "format": FORMAT,
            "version": self.VERSION,
            "name": self.name,
            **self._stored_content(),
            "specials": dict(self.specials),
            "end_of_text": self.end_of_text,
            "bos_id": self.bos_id,
            "normalization": self.normalization,
            "chat_template": self.chat_template,
            "hash": self.hash,
        }

    @abstractmethod
    def _stored_content(self) -> dict[str, str]:
        """Of `to_dict` what only this kind has."""

    @classmethod
    @abstractmethod
    def from_stored(cls, values: dict[str, Any], details: dict[str, Any]) -> Tokenizer:
        """A tokenizer of this kind from `to_dict`, whose types are `FIELDS`.

        Args:
            values: all of it.
            details: of it the fields of `Tokenizer`, but for the name.

        Raises:
            UserError, ValueError: if it is damaged.
        """

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: str = "tokenizer") -> Tokenizer:
        """The inverse of `to_dict`, for every kind.

        Raises:
            UserError: not a tokenizer of ours, or damaged; `origin` says where it came from.
        """
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise UserError(f"{origin}: not a tokenizer of lit_gpt; lit_gpt convert reads other projects' tokenizers")
        version = values.get("version")
        if type(version) is not int or version not in _KINDS:
            known = " and ".join(map(str, _KINDS))
            raise UserError(f"{origin}: version {brief(version)} of the format; this lit_gpt reads {known}")
        kind = _kind(version)
        for key, types in kind.FIELDS.items():
            value = values.get(key)
            if key not in values or not isinstance(value, types) or isinstance(value, bool):
                raise UserError(f"{origin}: damaged, its {key} is {brief(value)}; write it again")
        try:
            details = {key: values[key] for key in ("end_of_text", "bos_id", "normalization", "chat_template")}
            tokenizer: Tokenizer = kind.from_stored(values, details)
        except UserError as error:
            raise UserError(f"{origin}: {error}") from error
        except ValueError as error:  # of base64, of a number, of a lone surrogate
            raise UserError(f"{origin}: damaged ({' '.join(str(error).split())[:200]}); write it again") from None
        if tokenizer.hash != values["hash"]:
            raise UserError(f"{origin}: damaged, its content does not have the hash it names; write it again")
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


class TextStream:
    """Text from tokens as they come, which go on with a text: a character appears once all its bytes have.

    >>> stream = TextStream(get_tokenizer("byte"))
    >>> stream.feed([228, 189]), stream.feed([160])
    ('', '你')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, tokens: Iterable[int] | bytes) -> str:
        """The characters that are complete now, after these further ids or bytes."""
        if not isinstance(tokens, bytes):
            tokens = b"".join(self._tokenizer.token_bytes(token) for token in tokens)
        return self._decoder.decode(tokens)

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
        return _kind(_BYTE_LEVEL)(name=spec, encoding=named_encoding(spec))
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
