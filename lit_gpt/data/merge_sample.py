"""The sample of text from which byte-pair merges are learnt."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

from lit_gpt.data.readers import best_cut, read_texts
from lit_gpt.data.text_source import OnRead, TextSource

SAMPLE_BYTES = 1 << 25  # of text
SLICE_CHARACTERS = 1 << 14
# Training takes some hundred bytes of memory for each letter of each different word. Chinese, base64 and the like have
# long words that hardly ever come again, so that 24 MB of them would take 3 GB: there a smaller sample has to do.
DISTINCT_WORD_BYTES = 1_500_000
WORD_LENGTH = 256  # characters; the time that training takes grows with the square of it
WORD = re.compile(r"\w+|\W+")


def merge_sample(sources: list[TextSource], on_read: OnRead) -> Iterator[str]:
    """Slices of the sources, as many as training has memory for; their order is shuffled, but always the same."""
    slices = list(_slices(sources, on_read))
    random.Random(0).shuffle(slices)
    known: set[str] = set()
    distinct_bytes = 0
    for text in slices:
        words = set(WORD.findall(text))
        distinct_bytes += sum(len(word.encode()) for word in words - known)
        known |= words
        longest = max(map(len, words))
        step = WORD_LENGTH if longest > WORD_LENGTH else len(text)
        yield from (text[start : start + step] for start in range(0, len(text), step))
        if distinct_bytes > DISTINCT_WORD_BYTES:
            return


def _slices(sources: list[TextSource], on_read: OnRead) -> Iterator[str]:
    """About `SAMPLE_BYTES`, spread over the sources by size: of a large one the beginning, of many small ones some."""
    total = sum(source.size for source in sources)
    allowed = taken = 0.0
    for source in sources:
        allowed += source.size * min(1.0, SAMPLE_BYTES / total)
        texts = read_texts(source, on_read)
        while taken < allowed and (piece := next(texts, None)):
            taken += len(piece.text.encode())
            text = piece.text
            while len(text) > SLICE_CHARACTERS:
                cut = best_cut(text, SLICE_CHARACTERS)
                yield text[:cut]
                text = text[cut:]
            yield text
