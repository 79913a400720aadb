"""Tokenizers of BPE over characters with byte fallback, as SentencePiece has it, by the `tokenizers` library.

Llama 2, Mistral, Phi-3 and Gemma have one. Spaces are a character of the vocabulary, and a character that it lacks is
the tokens of its UTF-8 bytes. Merges are of characters, so that it cannot be a `tiktoken.Encoding`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from lit_gpt.errors import UserError, brief
from lit_gpt.tokenizer.byte_fallback_content import BYTE_TOKENS, SPACE, checked_content, steps_of
from lit_gpt.tokenizer.json_object import parse_json
from lit_gpt.tokenizer.tokenizer import EncodedParts, Tokenizer
from lit_gpt.tokenizer.vocabulary import is_panic

NORMALIZATION = "spaces"


@dataclass(frozen=True, eq=False, kw_only=True)
class ByteFallbackTokenizer(Tokenizer):
    """A model's own `tokenizer.json`, and what has to be known beside it.

    A text may get a space in front before it is encoded, which `decode` takes away again. `token_bytes`, and so a
    stream of text that goes on with another, keep it: there it is the space between two words.

    Attributes:
        content: the checked parts of `tokenizer.json`.
    """

    VERSION: ClassVar[int] = 2
    FIELDS: ClassVar[dict[str, tuple[type, ...]]] = {**Tokenizer.FIELDS, "content": (str,)}

    normalization: str | None = NORMALIZATION
    content: dict[str, Any]

    def __post_init__(self) -> None:
        if self.normalization != NORMALIZATION:
            raise UserError(f'tokenizer "{self.name}": its normalization must be "{NORMALIZATION}"')
        if self.bos_id is not None and self.bos_id not in self.specials.values():
            raise UserError(f'tokenizer "{self.name}": bos_id {brief(self.bos_id)} is none of its special tokens')
        super().__post_init__()

    @classmethod
    def of_content(cls, name: str, values: dict[str, Any], **details: Any) -> ByteFallbackTokenizer:
        """A tokenizer from a `tokenizer.json` and the remaining fields of `Tokenizer`.

        Raises:
            UserError: for what is not done here, naming it.
        """
        tokenizer = cls(name=name, content=checked_content(values), **details)
        tokenizer._of_text  # noqa: B018  so that what the library refuses is known now
        return tokenizer

    def __reduce__(self) -> tuple[Any, ...]:
        return Tokenizer.from_dict, (self.to_dict(), self.name)

    @cached_property
    def specials(self) -> dict[str, int]:
        """Name → id of the special tokens."""
        return {token["content"]: token["id"] for token in self.content["added_tokens"] if token["special"]}

    @cached_property
    def n_vocab(self) -> int:
        """The largest id + 1; ids may have gaps below it."""
        return max([*self._vocabulary.values(), *self.specials.values()]) + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 of all that decides which ids a text becomes: the checked parts of `tokenizer.json`."""
        return hashlib.sha256(self._content_text.encode()).hexdigest()

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: a text of n characters is at least n / `longest_token` tokens."""
        return max(map(len, self._bytes_of.values()))

    def encode_with_specials(self, text: str) -> list[int]:
        """As `Tokenizer.encode_with_specials`."""
        return _encode(self._of_text_with_specials, text)

    def encode_parts(self, parts: Sequence[str | int]) -> EncodedParts:
        """As `Tokenizer.encode_parts`.

        The library gets the rendering whole, since what it does to a text depends on whether it is the first; but with
        other names for the special tokens, which no text can have in it.
        """
        library, codes = self._of_parts
        names = {number: name for name, number in self.specials.items()}
        written = [codes[part] if isinstance(part, int) else part for part in parts]
        there = [0]  # where each part begins in what the library gets
        here = [0]  # and in the rendering
        for part, text in zip(parts, written):
            there.append(there[-1] + len(text))
            here.append(here[-1] + len(names[part] if isinstance(part, int) else part))
        encoding = library.encode("".join(written), add_special_tokens=False)

        def position(offset: int) -> int:
            part = bisect_right(there, offset) - 1
            return here[part] + (offset - there[part])

        starts, ends = zip(*encoding.offsets) if encoding.ids else ((), ())
        return EncodedParts(encoding.ids, list(map(position, starts)), list(map(position, ends)))

    def with_specials(self, names: Sequence[str], chat_template: str | None) -> ByteFallbackTokenizer:
        """As `Tokenizer.with_specials`."""
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
        added = [token for token in self.content["added_tokens"] if token["special"] or token["content"] not in names]
        next_id, vocabulary = self.n_vocab, self.content["model"]["vocab"]
        for name in names:
            if name not in self.specials:
                number = self._vocabulary.get(name, next_id)
                next_id += number == next_id
                added.append({"id": number, "content": name, **flags})
        if len({*self._vocabulary.values(), *self.specials.values()}) < self.n_vocab:
            # Another program would give a token that is not in the vocabulary the next free id, whatever its own is.
            vocabulary = vocabulary | {token["content"]: token["id"] for token in added}
        content = {**self.content, "added_tokens": added, "model": {**self.content["model"], "vocab": vocabulary}}
        details = {"bos_id": self.bos_id, "end_of_text": self.end_of_text, "chat_template": chat_template}
        return self.of_content(self.name, content, **details)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """As `encode`, as uint32 (T,)."""
        return np.array(_encode(self._of_text, text), np.uint32)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids of a whole text to bytes, without the space that was put in front; specials give none."""
        data = b"".join(self.token_bytes(token) for token in ids)
        return data.removeprefix(b" ") if self._strips_space else data

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id inside a text; b"" for specials and ids outside the vocabulary."""
        return self._bytes_of.get(int(token), b"")

    def _stored_content(self) -> dict[str, str]:
        """The parts of `tokenizer.json` as one text."""
        return {"content": self._content_text}

    @classmethod
    def from_stored(cls, values: dict[str, Any], details: dict[str, Any]) -> ByteFallbackTokenizer:
        """As `Tokenizer.from_stored`."""
        content = parse_json(values["content"].encode())
        if not isinstance(content, dict):
            raise ValueError("its content is no object")
        return cls.of_content(values["name"], content, **details)

    @cached_property
    def _content_text(self) -> str:
        return json.dumps(self.content, ensure_ascii=False, separators=(",", ":"))

    @cached_property
    def _strips_space(self) -> bool:
        """Whether the decoder takes a space from the start."""
        return any(
            step.get("start") == 1 or step.get("prepend_scheme", "never") != "never"
            for step in steps_of(self.content, "decoder")
        )

    @cached_property
    def _vocabulary(self) -> dict[str, int]:
        """Token → id, specials not included."""
        added = {token["content"]: token["id"] for token in self.content["added_tokens"]}
        return {text: i for text, i in {**self.content["model"]["vocab"], **added}.items() if text not in self.specials}

    @cached_property
    def _bytes_of(self) -> dict[int, bytes]:
        return {
            number: BYTE_TOKENS.get(token) or token.replace(SPACE, " ").encode("utf-8", "replace")
            for token, number in self._vocabulary.items()
        }

    @cached_property
    def _of_text(self) -> Any:
        """The library's tokenizer for text in which nothing is special: it does not know these tokens."""
        added = [token for token in self.content["added_tokens"] if not token["special"]]
        return self._library(added, self._vocabulary)

    @cached_property
    def _of_text_with_specials(self) -> Any:
        return self._library(self.content["added_tokens"], {**self._vocabulary, **self.specials})

    @cached_property
    def _of_parts(self) -> tuple[Any, dict[int, str]]:
        """The library's tokenizer with secret names for the special tokens, and the name of each id."""
        key = secrets.token_hex(8)
        codes = {number: f"\ue000{key}:{number}\ue001" for number in self.specials.values()}
        special = [token for token in self.content["added_tokens"] if token["special"]]
        renamed = [{**token, "content": codes[token["id"]]} for token in special]
        plain = [token for token in self.content["added_tokens"] if not token["special"]]
        vocabulary = {**self._vocabulary, **{codes[number]: number for number in self.specials.values()}}
        return self._library([*plain, *renamed], vocabulary), codes

    def _library(self, added: list[dict[str, Any]], vocabulary: dict[str, int]) -> Any:
        # A token that is added but not in the vocabulary would get the next free id, whatever its own is.
        model = {**self.content["model"], "vocab": vocabulary}
        return hub_tokenizer({**self.content, "added_tokens": added, "model": model}, f'tokenizer "{self.name}"')


def hub_tokenizer(values: dict[str, Any], where: str) -> Any:
    """A `tokenizer.json` in Hugging Face's own library, without the padding and truncation that one may ask for.

    Raises:
        UserError: which begins with `where`, for a file that the library refuses.
    """
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps({**values, "truncation": None, "padding": None}))
    except BaseException as error:  # the library raises bare exceptions
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise UserError(f"{where} is damaged ({' '.join(str(error).split())[:200]}): get it again") from None


def _encode(library: Any, text: str) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, of which the library says that it is no text
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return library.encode(text, add_special_tokens=False).ids
