"""The part of a corpus from which byte-pair merges are learned."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from lit_gpt.data.readers import best_cut, read_texts
from lit_gpt.data.sources import OnRead, TextSource

SAMPLE = 1 << 25  # bytes of text
SLICE = 1 << 14  # characters
# Training takes some hundred bytes of memory for each letter of each different word. Chinese, base64 and the like have
# long words that hardly ever come again, so that 24 MB of them would take 3 GB: there a smaller sample has to do.
LETTERS = 1_500_000  # bytes of different words
WORD_LENGTH = 256  # characters; the time that training takes grows with the square of it
WORD = re.compile(r"\w+|\W+")


def sample(sources: list[TextSource], text_field: str, on_read: OnRead) -> Iterator[str]:
    """Slices of the sources, as many as training has memory for; their order is shuffled, but always the same."""
    slices = list(_slices(sources, text_field, on_read))
    random.Random(0).shuffle(slices)
    known: set[str] = set()
    letters = 0
    for text in slices:
        words = set(WORD.findall(text))
        letters += sum(len(word.encode()) for word in words - known)
        known |= words
        longest = max(map(len, words))
        step = WORD_LENGTH if longest > WORD_LENGTH else len(text)
        yield from (text[start : start + step] for start in range(0, len(text), step))
        if letters > LETTERS:
            return


def _slices(sources: list[TextSource], text_field: str, on_read: OnRead) -> Iterator[str]:
    """About `SAMPLE` bytes, spread over the sources by size: of a large one the beginning, of many small ones some."""
    total = sum(source.size for source in sources)
    allowed = taken = 0.0
    for source in sources:
        allowed += source.size * min(1.0, SAMPLE / total)
        texts = read_texts(source, text_field, on_read)
        while taken < allowed and (piece := next(texts, None)):
            taken += len(piece.text.encode())
            text = piece.text
            while len(text) > SLICE:
                cut = best_cut(text, SLICE)
                yield text[:cut]
                text = text[cut:]
            yield text
