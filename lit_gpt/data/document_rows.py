"""Rows of whole documents of text: each begins with one, and every token but the first is learnt once an epoch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.data.loader import as_tensors
from lit_gpt.data.masks import READ_AT_ONCE
from lit_gpt.data.packing import Ints, pack
from lit_gpt.data.token_stream import TokenStream, check_ids


class DocumentRows:
    """The documents of a split, packed into rows of T tokens, each with the token after it as its target.

    A document begins with an end-of-text token, after which a model writes a new text, and the last target of a
    document is the next one's. One longer than T tokens is cut into parts of T and what is left, each of which is
    packed like a document of its own. Nothing is left out. About 20 bytes of memory for each document.

    Attributes:
        tokens: of the split.
        block_size: T.
        report: what there is and how much of it is padding, a line of text.
    """

    def __init__(
        self,
        tokens: TokenStream,
        eot_id: int,
        block_size: int,
        seed: int,
        vocab_size: int | None = None,
        attend_across: bool = False,
    ) -> None:
        """Read all tokens and fill the rows; the same on every rank.

        Args:
            tokens: of the split, at least two.
            eot_id: the id that stands between documents.
            block_size: T.
            seed: of the order of documents of one length.
            vocab_size: ids at or above it are refused.
            attend_across: leave `Batch.documents` out: a row is one text.

        Raises:
            UserError: a file that has shrunk.
        """
        self.tokens, self.block_size, self._vocab_size = tokens, block_size, vocab_size
        self._attend_across = attend_across
        starts = find_starts(tokens, eot_id)
        parts = cut_documents(starts, len(tokens) - 1, block_size)
        lengths = np.diff(parts, append=len(tokens) - 1)
        packing = pack(lengths, block_size, seed)
        self._starts, self._lengths = parts[packing.order], lengths[packing.order].astype(np.int32)
        self._offsets = packing.offsets
        self.padding = 1 - (len(tokens) - 1) / (packing.rows * block_size)
        long = len(parts) - len(starts)
        self.report = (
            f"{len(starts):,} documents of {len(tokens):,} tokens in {packing.rows:,} rows of {block_size}, "
            f"{100 * self.padding:.1f} % padding{f'; {long:,} cuts in longer ones' if long else ''}"
        )

    def __len__(self) -> int:
        """Rows."""
        return len(self._offsets) - 1

    @property
    def fingerprint(self) -> str:
        """A hash of what the tokens are, and that they are in rows of documents."""
        return hashlib.sha256(f"documents {self.tokens.fingerprint}".encode()).hexdigest()

    def documents(self, row: int) -> list[tuple[int, int]]:
        """The (first token, number of tokens) of each document, or part of one, in a row, in order."""
        some = slice(self._offsets[row], self._offsets[row + 1])
        return list(zip(self._starts[some].tolist(), self._lengths[some].tolist()))

    def read(self, rows: Sequence[int], size: int, pin: bool) -> Batch:
        """Some rows as a batch of `size` rows; those that are missing, and what documents leave free, is padding.

        Args:
            rows: numbers of rows.
            size: B.
            pin: in page-locked memory, for a GPU.

        Raises:
            UserError: an id that the vocabulary does not have, or a file that has shrunk.
        """
        idx = np.zeros((size, self.block_size), np.int64)
        targets, documents = np.full_like(idx, IGNORE_INDEX), np.zeros_like(idx)
        for number, row in enumerate(rows):
            end = 0
            for document, (start, length) in enumerate(self.documents(row)):
                tokens = self.tokens.read(start, length + 1)
                check_ids(tokens, self._vocab_size, self.tokens.shards[0].name, start)
                here = slice(end, end + length)
                idx[number, here], targets[number, here] = tokens[:-1], tokens[1:]
                documents[number, end:] = document
                end += length
            documents[number, end:] += 1  # padding, where nothing follows
        return as_tensors(idx, targets, pin, None if self._attend_across else documents)


def find_starts(tokens: TokenStream, eot_id: int) -> Ints:
    """The first tokens (n,) of the documents of a split: the very first token, and each end-of-text but the last token.

    Args:
        tokens: all of which are read, at least two.
        eot_id: the id that stands between documents.
    """
    found = [np.zeros(1, np.int64)]
    last = len(tokens) - 1  # a target only
    for start in range(1, last, READ_AT_ONCE):
        part = tokens.read(start, min(READ_AT_ONCE, last - start))
        found.append(np.flatnonzero(part == eot_id) + start)
    return np.concatenate(found)


def cut_documents(starts: Ints, end: int, capacity: int) -> Ints:
    """The first tokens (m,) of the parts of documents, m ≥ n, so that none has more tokens than `capacity`.

    Args:
        starts: (n,) first tokens of the documents, ascending.
        end: the token after the last document.
        capacity: the most tokens of a part.
    """
    lengths = np.diff(starts, append=end)
    parts = -(-lengths // capacity)  # of each document
    first_parts = np.cumsum(parts) - parts
    inside = np.arange(int(parts.sum())) - np.repeat(first_parts, parts)
    return np.repeat(starts, parts) + inside * capacity
