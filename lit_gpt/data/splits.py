"""The rule by which text is held out for validation: documents picked by their hash, or the tail of the text."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lit_gpt.data.readers import Text
from lit_gpt.errors import UserError

HASH_DOCUMENTS = 100  # documents from which "auto" picks by hash
MAX_COUNTED_DOCUMENTS = 2000  # documents after which counting on would change nothing
VAL_DOCUMENTS = 20  # documents that "auto" wants in validation
MAX_VAL_BYTES = 1 << 25  # bytes of text that "auto" holds out of a large corpus


class SplitText(NamedTuple):
    """Text of one split; a document ends with it if `ends`. `where` is that of the `Text`."""

    text: str
    ends: bool
    split: str
    where: str = ""


@dataclass(frozen=True)
class SplitRule:
    """Kind "hash" picks documents with probability `fraction`, "tail" the last `fraction` of the text; "auto" is to be
    resolved first.

    >>> Split.parse("tail:0.1")
    Split(kind='tail', fraction=0.1)
    """

    kind: str
    fraction: float = 0.0

    @classmethod
    def parse(cls, spec: str) -> SplitRule:
        """Read "auto", "hash:F" or "tail:F", 0 <= F < 1; with 0 everything is for training.

        Raises:
            UserError: anything else.
        """
        kind, colon, fraction = spec.partition(":")
        try:
            rule = cls(kind, float(fraction) if colon else 0.0)
        except ValueError:
            rule = cls("")
        if (kind == "auto") is bool(colon) or rule.kind not in ("auto", "hash", "tail") or not 0 <= rule.fraction < 1:
            raise UserError(f'val_split "{spec}": write auto, hash:0.01 or tail:0.1, with a fraction from 0 to below 1')
        return rule

    def __str__(self) -> str:
        return self.kind if self.kind == "auto" else f"{self.kind}:{self.fraction:g}"

    def resolve(self, documents: int, size: int) -> SplitRule:
        """What "auto" means for a corpus.

        Args:
            documents: how many; whoever counts them may stop at `MAX_COUNTED_DOCUMENTS`.
            size: bytes of text.

        With many documents about twenty of them, but from one in a hundred to one in ten; with few the last tenth of
        the text; and of a large corpus about 32 MB, since validation reads all of it every time.
        """
        if self.kind != "auto":
            return self
        kind = "hash" if documents >= HASH_DOCUMENTS else "tail"
        fraction = min(0.1, max(0.01, VAL_DOCUMENTS / documents)) if kind == "hash" else 0.1
        return SplitRule(kind, float(f"{min(fraction, MAX_VAL_BYTES / max(size, 1)):.3g}"))

    def assign(self, texts: Iterable[Text], size: int, cuts: bool = True) -> Iterator[SplitText]:
        """Each piece of text with its split.

        Args:
            texts: all of them, in order.
            size: bytes (UTF-8) of all of them; only "tail" needs it.
            cuts: whether "tail" cuts the document on the border in two; else it is for validation.
        """
        if self.kind == "tail" and self.fraction:
            border = int(size * (1 - self.fraction))
            return self._by_bytes(texts, border) if cuts else self._by_end(texts, border)
        return self._by_hash(texts)

    def _by_hash(self, texts: Iterable[Text]) -> Iterator[SplitText]:
        """By the hash of a document's first piece: the same document twice is in the same split twice."""
        split = ""
        for text, ends, where in texts:
            if not split:
                digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
                split = "val" if int.from_bytes(digest, "big") / 2**64 < self.fraction else "train"
            yield SplitText(text, ends, split, where)
            split = "" if ends else split

    def _by_bytes(self, texts: Iterable[Text], border: int) -> Iterator[SplitText]:
        """The document on the border is cut in two, after the character that holds the last byte before `border`."""
        start = 0
        for text, ends, where in texts:
            data = text.encode()
            end = start + len(data)
            if start < border <= end:
                while border < end and data[border - start] & 0xC0 == 0x80:  # inside of a character
                    border += 1
                head = data[: border - start].decode()
                yield SplitText(head, True, "train", where)
                text = text[len(head) :]
            if text:
                yield SplitText(text, ends, "train" if end < border else "val", where)
            start = end

    @staticmethod
    def _by_end(texts: Iterable[Text], border: int) -> Iterator[SplitText]:
        """Whole documents, of which each is one piece: for training while they end before `border`."""
        end = 0
        for text, ends, where in texts:
            end += len(text.encode())
            yield SplitText(text, ends, "train" if end <= border else "val", where)
