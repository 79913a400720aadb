"""Rows of whole conversations: which tokens each row has, and batches of rows for training and validation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.data.loader import as_tensors
from lit_gpt.data.masks import COUNTS, find_documents
from lit_gpt.data.packing import Ints, cut_at_turns, pack
from lit_gpt.data.token_stream import TokenStream, check_ids
from lit_gpt.errors import UserError


class ConversationRows:
    """The conversations of a split, packed into rows of T + 1 tokens of which each begins with a conversation.

    A conversation longer than that is cut after a turn of the assistant. All else is in exactly one row, whole. About
    30 bytes of memory for each conversation.

    Attributes:
        tokens: of the split.
        block_size: T.
        report: what there is and how much of it is padding, a line of text.
    """

    def __init__(
        self,
        tokens: TokenStream,
        marks: TokenStream,
        block_size: int,
        seed: int,
        vocab_size: int | None = None,
        attend_across: bool = False,
    ) -> None:
        """Read the masks and fill the rows; the same on every rank.

        Args:
            tokens: of the split.
            marks: their masks.
            block_size: T.
            seed: of the order of conversations of one length.
            vocab_size: ids at or above it are refused.
            attend_across: leave `Batch.documents` out: a row is one text.

        Raises:
            UserError: a damaged mask, or nothing to learn.
        """
        self.tokens, self._marks, self.block_size, self._vocab_size = tokens, marks, block_size, vocab_size
        self._attend_across = attend_across
        starts, lengths = find_documents(marks)
        self.conversations = len(starts)
        starts, lengths, cut_report = self._cut_long(starts, lengths)
        if not len(starts):
            raise UserError(
                f"{tokens.shards[0].name}: no answer fits into a context of {block_size} tokens; raise block_size"
            )
        packing = pack(lengths, block_size + 1, seed)
        self._starts, self._lengths = starts[packing.order], lengths[packing.order].astype(np.int32)
        self._offsets = packing.offsets
        self.padding = 1 - int(lengths.sum()) / (packing.rows * (block_size + 1))
        self.report = (
            f"{self.conversations:,} conversations of {len(tokens):,} tokens in {packing.rows:,} rows of "
            f"{block_size + 1}, {100 * self.padding:.1f} % padding{cut_report}"
        )

    def _cut_long(self, starts: Ints, lengths: Ints) -> tuple[Ints, Ints, str]:
        """Starts and lengths in which no conversation is longer than a row, and what was done to those that were."""
        long = np.flatnonzero(lengths > self.block_size + 1)
        if not long.size:
            return starts, lengths, ""
        parts: list[tuple[int, int]] = []
        lost = 0
        for start, length in zip(starts[long].tolist(), lengths[long].tolist()):
            cut = cut_at_turns((self._marks.read(start, length) & COUNTS).astype(bool), self.block_size + 1)
            parts += [(start + first, stop - first) for first, stop in cut.parts]
            lost += cut.lost
        kept = np.delete(np.stack([starts, lengths]), long, axis=1)
        starts, lengths = np.concatenate([kept, np.array(parts, np.int64).reshape(-1, 2).T], axis=1)
        report = f"; {len(long):,} longer than the context of {self.block_size}, cut after turns into {len(parts):,}"
        return starts, lengths, report + (f", of which {lost:,} tokens fit into none" if lost else "")

    def __len__(self) -> int:
        """Rows."""
        return len(self._offsets) - 1

    @property
    def fingerprint(self) -> str:
        """A hash of what the tokens and their masks are."""
        return hashlib.sha256(f"{self.tokens.fingerprint} {self._marks.fingerprint}".encode()).hexdigest()

    def documents(self, row: int) -> list[tuple[int, int]]:
        """The (first token, number of tokens) of each conversation in a row, in order."""
        some = slice(self._offsets[row], self._offsets[row + 1])
        return list(zip(self._starts[some].tolist(), self._lengths[some].tolist()))

    def prompts(self, count: int) -> list[npt.NDArray[np.unsignedinteger]]:
        """The first conversations of the split up to where the assistant's first turn begins: ids (n,) of each."""
        found = []
        for number in np.argsort(self._starts)[:count]:
            start, length = int(self._starts[number]), int(self._lengths[number])
            counts = self._marks.read(start, length) & COUNTS
            found.append(self.tokens.read(start, max(1, int(counts.argmax()))))
        return found

    def read(self, rows: Sequence[int], size: int, pin: bool) -> Batch:
        """Some rows as a batch of `size` rows; those that are missing, and what conversations leave free, is padding.

        Args:
            rows: numbers of rows.
            size: B.
            pin: in page-locked memory, for a GPU.

        Raises:
            UserError: an id that the vocabulary does not have, or a file that has shrunk.
        """
        ids = np.zeros((size, self.block_size + 1), np.int64)
        counts = np.zeros(ids.shape, bool)
        documents = np.zeros(ids.shape, np.int64)
        for number, row in enumerate(rows):
            end = 0
            for document, (start, length) in enumerate(self.documents(row)):
                tokens = self.tokens.read(start, length)
                check_ids(tokens, self._vocab_size, self.tokens.shards[0].name, start)
                ids[number, end : end + length] = tokens
                counts[number, end + 1 : end + length] = self._marks.read(start + 1, length - 1) & COUNTS
                documents[number, end : end + length] = document
                documents[number, end + length :] = document + 1  # padding, if nothing follows
                end += length
        targets = np.where(counts, ids, IGNORE_INDEX)[:, 1:]
        seen = None if self._attend_across else np.ascontiguousarray(documents[:, :-1])
        return as_tensors(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(targets), pin, seen)
