"""Beginnings of documents: short texts as the training text begins, for prompts that suit a model."""

from __future__ import annotations

import numpy as np

from lit_gpt.data.matches import Tokens
from lit_gpt.tokenizer.tokenizer import Tokenizer

SEARCHED = 1 << 18
"""Tokens at the start of the stream in which documents are looked up."""
_READ = 96  # tokens of a document: enough for `_CHARACTERS` of four bytes each
_CHARACTERS, _WORDS = 24, 3


def document_beginnings(stream: Tokens, tokenizer: Tokenizer, count: int) -> list[str]:
    """The first words of some documents, each once: at most `count`.

    Args:
        stream: the tokens, document after document, with end-of-text between them.
        tokenizer: that of the tokens.
        count: how many texts at most.
    """
    tokens = stream.read(0, min(len(stream), SEARCHED))
    ends = np.flatnonzero(tokens == tokenizer.eot_id) if tokenizer.eot_id is not None else np.empty(0, np.int64)
    starts = [start for start in (0, *(ends + 1).tolist()) if start < len(tokens)]
    spread = dict.fromkeys(starts[len(starts) * i // (4 * count)] for i in range(4 * count))  # some may be alike
    texts = (_first_words(tokens[start : start + _READ].tolist(), tokenizer) for start in spread)
    return list(dict.fromkeys(text for text in texts if text))[:count]


def _first_words(ids: list[int], tokenizer: Tokenizer) -> str:
    """A document that begins with `ids`, up to the first words of its first line that has a letter or a digit.

    "" where there is none, or where the ids are no whole characters.
    """
    document = ids[: ids.index(tokenizer.eot_id)] if tokenizer.eot_id in ids else ids
    lines = tokenizer.decode(document).strip().split("\n")
    number = next((number for number, line in enumerate(lines) if any(map(str.isalnum, line))), None)
    if number is None:
        return ""
    line = lines[number]
    if len(line) > _CHARACTERS:
        whole_words = line[: _CHARACTERS + 1].rpartition(" ")[0]
        line = whole_words or line[:_CHARACTERS]
    text = "\n".join([*lines[:number], " ".join(line.split(" ")[:_WORDS])]).rstrip()
    return "" if "\N{REPLACEMENT CHARACTER}" in text else text
