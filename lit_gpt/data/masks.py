"""The loss mask of tokens: one byte for each, which says whether it counts and whether a document begins with it.

The mask of a shard lies beside it, `train_000000.mask` beside `train_000000.bin`, in the same format. So the index of
the masks is one of shards, and whatever reads, checks or fetches shards does so with masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from lit_gpt.data.index import Shard, ShardIndex
from lit_gpt.data.shards import mask_of
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError

COUNTS = 1  # bit: the token is one to be learnt, of an assistant's turn
BEGINS = 2  # bit: a document, such as a conversation, begins with the token
MASK_DTYPE = "uint8"
REMEDY = "damaged; prepare the folder again"
READ_AT_ONCE = 1 << 22  # bytes of a mask

Mask = npt.NDArray[np.uint8]


def marks_of(counts: Sequence[bool]) -> Mask:
    """The mask (n,) of one document from whether each of its tokens counts."""
    marks = np.asarray(counts, np.uint8) * np.uint8(COUNTS)
    marks[:1] |= BEGINS
    return marks


def mask_index(index: ShardIndex) -> ShardIndex:
    """The masks of a folder as an index of shards."""
    return replace(index, dtype=MASK_DTYPE, shards=tuple(map(mask_of, index.shards)))


def find_documents(marks: TokenStream) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Where each document of a split begins and how many tokens it has, (n,) each.

    Args:
        marks: the masks of the split, all of which are read.

    Raises:
        UserError: a mask that is none: unknown bits, or a shard that does not begin with a document.
    """
    begins, position = [], 0
    for shard in marks.shards:
        for start in range(position, position + shard.tokens, READ_AT_ONCE):
            found = marks.read(start, min(READ_AT_ONCE, position + shard.tokens - start))
            check_marks(found, shard, start - position)
            begins.append(np.flatnonzero(found & BEGINS) + start)
        position += shard.tokens
    starts = np.concatenate(begins).astype(np.int64) if begins else np.zeros(0, np.int64)
    return starts, np.diff(starts, append=position)


def check_marks(marks: npt.NDArray[np.unsignedinteger], shard: Shard, start: int) -> None:
    """Refuse what is no mask.

    Args:
        marks: (n,) of a shard.
        shard: the mask's.
        start: which token of the shard is the first of them.

    Raises:
        UserError: naming the first byte that is wrong.
    """
    unknown = marks > (COUNTS | BEGINS)
    if unknown.any():
        at = int(unknown.argmax())
        raise UserError(f"{shard.name}: byte {marks[at]} at token {start + at} is no part of a mask: {REMEDY}")
    if start == 0 and marks.size and not marks[0] & BEGINS:
        raise UserError(f"{shard.name}: its first token begins no document: {REMEDY}")
