"""Figures from the matches: the share of new n-grams, the longest verbatim spans and their documents.

The measures follow McCoy et al. 2021 (arXiv 2111.09509): generated text is compared with held-out text, since real
text, too, repeats much of what was written before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from lit_gpt.data.matches import Match
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.tokenizer.tokenizer import Tokenizer

ORDERS = range(2, 21)
"""The n of the n-grams."""

_SURROUNDINGS = 40  # tokens shown on either side of a span
_COUNTED = 1 << 22  # tokens read in one go when documents are counted


@dataclass(frozen=True)
class Novelty:
    """Figures of some texts together.

    Attributes:
        texts: how many.
        tokens: in all of them.
        novel: n → share of their n-grams that do not occur in the training tokens; None where no text has n tokens.
        mean: longest match from a position on, in tokens, on average over all positions.
        median: the same, the middle one.
        longest: the longest of all.
    """

    texts: int
    tokens: int
    novel: dict[int, float | None]
    mean: float
    median: float
    longest: int

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def novelty(matches: Sequence[Match]) -> Novelty:
    """Sum up. An n-gram is new where the longest match from its first token on is shorter than n."""
    lengths = np.concatenate([match.lengths for match in matches])
    return Novelty(
        texts=len(matches),
        tokens=len(lengths),
        novel={n: _share(matches, n) for n in ORDERS},
        mean=float(lengths.mean()),
        median=float(np.median(lengths)),
        longest=int(lengths.max()),
    )


def _share(matches: Sequence[Match], n: int) -> float | None:
    """A text of T tokens has T - n + 1 n-grams."""
    whole = [match.lengths[: max(0, len(match.lengths) - n + 1)] for match in matches]
    count = sum(len(lengths) for lengths in whole)
    return float(sum((lengths < n).sum() for lengths in whole) / count) if count else None


@dataclass(frozen=True)
class Span:
    """A verbatim run of training tokens in a text.

    Attributes:
        text: number of the text.
        start: position in the text.
        length: tokens.
        piece: its text.
        position: of its first occurrence in the training tokens.
        shard: the file that holds it.
        document: number of the document, from 0, where the shards mark documents.
        offset: position in the document.
        before: the training text before it.
        after: the training text after it.
    """

    text: int
    start: int
    length: int
    piece: str
    position: int
    shard: str
    document: int | None
    offset: int | None
    before: str
    after: str

    def to_dict(self) -> dict[str, object]:
        """Plain values under the keys of the JSON report, which calls the position `place`."""
        return {"place" if name == "position" else name: value for name, value in asdict(self).items()}


def longest_spans(
    matches: Sequence[Match], stream: TokenStream, tokenizer: Tokenizer, eot_after: bool = True, count: int = 5
) -> list[Span]:
    """The `count` longest verbatim spans, none overlapping another, longest first.

    Args:
        matches: of each text.
        stream: the training tokens.
        tokenizer: that they were made with.
        eot_after: whether the end-of-text token stands after a document rather than before it.
        count: how many.
    """
    chosen = _choose(matches, count)
    positions = [int(matches[text].positions[start]) for text, start, _ in chosen]
    documents = _documents(stream, positions, tokenizer.eot_id)
    spans = []
    for (text, start, length), position in zip(chosen, positions):
        number, first = documents[position] if documents else (None, None)
        spans.append(
            Span(
                text=text,
                start=start,
                length=length,
                piece=_read(stream, tokenizer, position, position + length),
                position=position,
                shard=stream.shards[stream.shard_range(position, 1)[0]].name,
                document=number if number is None or eot_after else max(0, number - 1),
                offset=None if first is None else position - first,
                before=_read(stream, tokenizer, max(first or 0, position - _SURROUNDINGS), position),
                after=_until_end(stream, tokenizer, position + length),
            )
        )
    return spans


def _choose(matches: Sequence[Match], count: int) -> list[tuple[int, int, int]]:
    """(text, start, length) of the longest spans that do not overlap."""
    left = [match.lengths.copy() for match in matches]
    chosen: list[tuple[int, int, int]] = []
    while len(chosen) < count:
        text = max(range(len(left)), key=lambda k: int(left[k].max(initial=0)))
        length = int(left[text].max(initial=0))
        if length == 0:
            break
        start = int(left[text].argmax())
        chosen.append((text, start, length))
        lengths = left[text]
        lengths[start : start + length] = 0
        lengths[:start] = np.minimum(lengths[:start], start - np.arange(start))
    return chosen


def _documents(stream: TokenStream, positions: list[int], eot_id: int | None) -> dict[int, tuple[int, int]]:
    """For each position the number of end-of-text tokens before it, and the position after the last of them."""
    if eot_id is None:
        return {}
    found: dict[int, tuple[int, int]] = {}
    number, first, start = 0, 0, 0
    for position in sorted(set(positions)):
        while start < position:
            ids = stream.read(start, min(_COUNTED, position - start))
            ends = np.flatnonzero(ids == eot_id)
            if len(ends):
                number, first = number + len(ends), start + int(ends[-1]) + 1
            start += len(ids)
        found[position] = (number, first)
    return found


def _read(stream: TokenStream, tokenizer: Tokenizer, start: int, stop: int) -> str:
    return tokenizer.decode(stream.read(start, stop - start))


def _until_end(stream: TokenStream, tokenizer: Tokenizer, start: int) -> str:
    """What follows in the same document."""
    ids = stream.read(start, min(_SURROUNDINGS, len(stream) - start))
    ends = np.flatnonzero(ids == (-1 if tokenizer.eot_id is None else tokenizer.eot_id))
    return tokenizer.decode(ids[: ends[0]] if len(ends) else ids)


def held_out_windows(stream: TokenStream, lengths: Sequence[int]) -> Sequence[NDArray[np.generic]]:
    """As many windows of held-out tokens as there are `lengths`, of these lengths, spread evenly, none overlapping.

    Where the split is too small for all of them, there are fewer.
    """
    wanted: list[int] = []
    for length in lengths:
        if sum(wanted) + length > len(stream):
            break
        wanted.append(length)
    if not wanted:
        return [stream.read(0, len(stream))]
    gap, start, windows = (len(stream) - sum(wanted)) // len(wanted), 0, []
    for length in wanted:
        windows.append(stream.read(start, length))
        start += length + gap
    return windows
