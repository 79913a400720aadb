"""Checks and excerpts of a prepared folder: `prepare --check` verifies every byte, `--show` prints first documents."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lit_gpt.console import note
from lit_gpt.data.index import ShardIndex
from lit_gpt.data.shard_folder import check_folder, load_index, open_tokens
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer

DOCUMENTS = 3
CHARACTERS = 1000  # of each document
WINDOW = 1 << 14  # tokens read at a time in search of a document's end


def check(folder: str, tokenizer: str | None = None) -> ShardIndex:
    """Verify headers, counts and hashes, that ids fit the vocabulary, and that the tokenizer is the shards' own.

    Args:
        folder: of shards.
        tokenizer: whose vocabulary counts where the folder has no tokenizer.

    Raises:
        UserError: naming what is wrong.
    """
    own = _own_tokenizer(folder)
    known = own or (get_tokenizer(tokenizer) if tokenizer else None)
    index = check_folder(folder, known.n_vocab if known else None, lambda shard: note(f"{shard.name} is all right"))
    if own and index.tokenizer_hash and own.hash != index.tokenizer_hash:
        path = Path(folder) / TOKENIZER_FILE
        raise UserError(f"{path}: not the tokenizer that made the shards ({index.tokenizer}); prepare it again")
    return index


def show(folder: str, tokenizer: str | None = None) -> Iterator[str]:
    """The first documents of each split as text, a heading before each.

    Args:
        folder: of shards.
        tokenizer: how to decode them where the folder has no tokenizer; GPT-2's otherwise.
    """
    decoder = _own_tokenizer(folder) or get_tokenizer(tokenizer or "gpt2")
    splits = {shard.split for shard in load_index(folder).shards}
    for split in ("train", "val", "test"):
        if split not in splits:
            continue
        for number, (ids, whole) in enumerate(_first_documents(folder, split, decoder.eot_id), 1):
            text = decoder.decode(ids)
            more = "" if whole and len(text) <= CHARACTERS else " …"
            yield f"── {split}, document {number}: {len(ids):,} tokens{'' if whole else ' and more'} ──"
            yield text[:CHARACTERS] + more


def _own_tokenizer(folder: str) -> Tokenizer | None:
    return Tokenizer.load(folder) if (Path(folder) / TOKENIZER_FILE).exists() else None


def _first_documents(folder: str, split: str, eot_id: int | None) -> list[tuple[np.ndarray, bool]]:
    """Ids of the first documents and whether each is complete; the end-of-text id may stand before or after one."""
    tokens = open_tokens(folder, split)
    ids = tokens.read(0, min(len(tokens), DOCUMENTS * WINDOW))
    ends = np.flatnonzero(ids == eot_id) if eot_id is not None else np.array([], int)
    parts = np.split(ids, ends)
    documents = [(part[part != eot_id] if eot_id is not None else part, True) for part in parts]
    if len(ids) < len(tokens):
        documents[-1] = (documents[-1][0], False)
    return [document for document in documents if document[0].size][:DOCUMENTS]
