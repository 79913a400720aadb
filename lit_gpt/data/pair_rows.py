"""Rows of whole pairs of answers: which conversations each row has, and batches with the reference model's figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from lit_gpt.batch import IGNORE_INDEX, PairBatch
from lit_gpt.data.conversation_rows import ConversationRows
from lit_gpt.data.masks import COUNTS, REMEDY, find_documents
from lit_gpt.data.packing import pack
from lit_gpt.data.token_stream import TokenStream, check_ids
from lit_gpt.errors import UserError


class PairRows(ConversationRows):
    """The pairs of a split, packed into rows of 2 T tokens: whoever fits into the context does so with its counterpart.

    A pair is never in two rows. One of which an answer with its prompt is longer than T tokens is left out: without its
    end it would be another answer.

    Attributes:
        reference: (n, 2) float32 log-probabilities of the chosen and the rejected answer of each of the split's n
            pairs under the reference model; NaN before they are known.
    """

    def __init__(
        self, tokens: TokenStream, marks: TokenStream, block_size: int, seed: int, vocab_size: int | None = None
    ) -> None:
        """Read the masks and fill the rows; the same on every rank.

        Args:
            tokens: of the split: the conversations of each pair, first that with the chosen answer.
            marks: their masks.
            block_size: T.
            seed: of the order of pairs of one length.
            vocab_size: ids at or above it are refused.

        Raises:
            UserError: a damaged mask, or no pair that fits.
        """
        self.tokens, self._marks, self.block_size, self._vocab_size = tokens, marks, block_size, vocab_size
        starts, lengths = find_documents(marks)
        if len(starts) % 2:
            raise UserError(f"{marks.shards[0].name}: {len(starts)} conversations make no pairs: {REMEDY}")
        starts, lengths = starts.reshape(-1, 2), lengths.reshape(-1, 2)
        self.conversations = starts.size
        fitting = np.flatnonzero((lengths <= block_size).all(1))
        if not fitting.size:
            raise UserError(
                f"{tokens.shards[0].name}: no pair fits into a context of {block_size} tokens; raise block_size"
            )
        packing = pack(lengths[fitting].sum(1), 2 * block_size, seed)
        self._numbers = fitting[packing.order]
        self._starts = starts[self._numbers].ravel()
        self._lengths = lengths[self._numbers].ravel().astype(np.int32)
        self._offsets = 2 * packing.offsets
        self._most_pairs = int(np.diff(packing.offsets).max())
        self.padding = 1 - int(self._lengths.sum()) / (packing.rows * 2 * block_size)
        self.reference = np.full((len(starts), 2), np.nan, np.float32)
        self.report = self._report(len(starts), len(starts) - fitting.size, packing.rows)

    def _report(self, pairs: int, left_out: int, rows: int) -> str:
        report = f"{pairs:,} pairs in {rows:,} rows of {2 * self.block_size}, {100 * self.padding:.1f} % padding"
        if not left_out:
            return report
        return f"{report}; {left_out:,} longer than the context of {self.block_size} are left out"

    def prompts(self, count: int) -> list[npt.NDArray[np.unsignedinteger]]:
        """The prompts of the first pairs of the split: ids (n,) of each."""
        return super().prompts(2 * count)[::2]  # each is there twice

    def read(self, rows: Sequence[int], size: int, pin: bool) -> PairBatch:  # type: ignore[override]
        """Some rows as a batch of `size` rows, filled up with padding.

        Args:
            rows: numbers of rows.
            size: B.
            pin: in page-locked memory, for a GPU.

        Raises:
            UserError: an id that the vocabulary does not have, or a file that has shrunk.
        """
        ids = np.zeros((size, 2 * self.block_size), np.int64)
        targets, documents = np.full_like(ids, IGNORE_INDEX), np.full_like(ids, -1)
        documents[:, self.block_size :] = -2  # padding has positions too, none beyond the context
        numbers = np.full((size, self._most_pairs), -1, np.int64)
        for number, row in enumerate(rows):
            first, past = self._offsets[row] // 2, self._offsets[row + 1] // 2
            numbers[number, : past - first] = self._numbers[first:past]
            end = 0
            for document, (start, length) in enumerate(self.documents(row)):
                tokens, counts = self.tokens.read(start, length), self._marks.read(start, length) & COUNTS
                check_ids(tokens, self._vocab_size, self.tokens.shards[0].name, start)
                ids[number, end : end + length] = tokens
                wanted = ids[number, end + 1 : end + length]
                targets[number, end : end + length - 1] = np.where(counts[1:], wanted, IGNORE_INDEX)
                documents[number, end : end + length] = document
                end += length
            documents[number, end : end + self.block_size] = -1
        reference = np.where(numbers[..., None] < 0, np.float32(np.nan), self.reference[numbers])
        tensors = map(torch.from_numpy, (ids, targets, documents, numbers, reference))
        return PairBatch(*(tensor.pin_memory() if pin else tensor for tensor in tensors))
