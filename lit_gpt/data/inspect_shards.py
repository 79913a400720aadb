"""Checks and excerpts of a prepared folder: `prepare --check` verifies every byte, `--show` prints first documents."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np

from lit_gpt.console.messages import note
from lit_gpt.data.formats import MASKED_FORMATS, check_template
from lit_gpt.data.index import INDEX, REMEDY, Shard, ShardIndex
from lit_gpt.data.masks import BEGINS, COUNTS, find_documents, mask_index
from lit_gpt.data.prepare_state import PrepareState
from lit_gpt.data.shard_folder import check_folder, load_index, open_tokens, read_lock
from lit_gpt.data.shards import Tokens
from lit_gpt.data.token_stream import TokenStream
from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import TOKENIZER_FILE, Tokenizer, get_tokenizer

DOCUMENTS = 3
CHARACTERS = 1000  # of each document
WINDOW = 1 << 14  # tokens read at a time in search of a document's end


def check(folder: str, tokenizer: str | None = None) -> ShardIndex:
    """Verify headers, counts and hashes, that ids fit the vocabulary, and that the tokenizer is the shards' own.

    The index's documents and bytes of text are counted in the tokens, and the index is compared with the state of its
    preparation, where there is one.

    Args:
        folder: of shards.
        tokenizer: whose vocabulary counts where the folder has no tokenizer.

    Raises:
        UserError: naming what is wrong.
    """
    if not load_index(folder).shards:  # there is no lock in a folder of something else
        raise UserError(f"{folder} has no token shards; make them with lit_gpt prepare TEXT --output {folder}")
    with read_lock(folder):
        own = _own_tokenizer(folder)
        known = own or (get_tokenizer(tokenizer) if tokenizer else None)
        state = PrepareState.read(Path(folder))
        if state is not None and state.finished:
            state.check_shards()
        counter = TextCounter(load_index(folder), own)
        vocab_size = known.n_vocab if known else None
        index = check_folder(folder, vocab_size, counter.add, counter.check, counter.add_mask)
    if own and index.tokenizer_hash and own.hash != index.tokenizer_hash:
        path = Path(folder) / TOKENIZER_FILE
        raise UserError(f"{path}: not the tokenizer that made the shards ({index.tokenizer}); prepare it again")
    if own and index.tokenizer_hash and (index.vocab_size, index.eot_id) != (own.n_vocab, own.eot_id):
        told, found = (index.vocab_size, index.eot_id), (own.n_vocab, own.eot_id)
        raise UserError(f"{folder}: {INDEX} says (vocab_size, eot_id) = {told}, its tokenizer {found}; {REMEDY}")
    if own and index.masked:
        check_template(index, own, Path(folder) / TOKENIZER_FILE)
    return index


class TextCounter:
    """Counts the documents and the bytes of text that a shard's tokens stand for, as far as they can tell."""

    def __init__(self, index: ShardIndex, tokenizer: Tokenizer | None) -> None:
        """Nothing is counted yet.

        Args:
            index: of the shards; one without a tokenizer's hash says nothing about text.
            tokenizer: of the shards, if it is known.
        """
        self._eot_id = index.eot_id if index.eot_position is not None else None
        self._parts = MASKED_FORMATS[index.format].parts if index.format in MASKED_FORMATS else None
        self._documents = self._text_bytes = 0
        self._lengths: np.ndarray | None = None
        if index.masked:
            return  # the tokens stand for more than the text: for what the chat template puts around it
        if tokenizer and index.tokenizer_hash == tokenizer.hash and tokenizer.normalization is None:
            lengths = [len(tokenizer.token_bytes(token)) for token in range(tokenizer.n_vocab)]
            self._lengths = np.array(lengths, np.int64)

    def add(self, tokens: Tokens) -> None:
        """Count tokens (n,), whose ids are in the vocabulary."""
        if self._eot_id is not None:
            self._documents += int(np.count_nonzero(tokens == self._eot_id))
        if self._lengths is not None:
            self._text_bytes += int(self._lengths[tokens].sum())

    def add_mask(self, mask: Tokens) -> None:
        """Count the documents that begin in a part of a mask (n,)."""
        self._documents += int(np.count_nonzero(mask & BEGINS))

    def check(self, shard: Shard) -> None:
        """Compare with what the index says of the shard whose tokens were counted, and begin with the next.

        Raises:
            UserError: naming both counts.
        """
        expected = shard.documents * (self._parts or 1)
        counts = [
            ("documents", expected, self._documents, self._eot_id is not None or self._parts is not None),
            ("bytes of text", shard.text_bytes, self._text_bytes, self._lengths is not None),
        ]
        for what, told, found, known in counts:
            if known and told != found:
                raise UserError(f"{shard.name}: {INDEX} says {told} {what}, its tokens are {found}; {REMEDY}")
        self._documents = self._text_bytes = 0
        note(f"{shard.name} is all right")


def show(folder: str, tokenizer: str | None = None) -> Iterator[str]:
    """The first documents of each split as text, a heading before each.

    Of conversations special tokens are shown by their names, and what counts in the loss stands between ⟦ and ⟧.

    Args:
        folder: of shards.
        tokenizer: how to decode them where the folder has no tokenizer; GPT-2's otherwise.
    """
    index = load_index(folder)  # whether there is a folder at all, before its tokenizer
    decoder = _own_tokenizer(folder) or get_tokenizer(tokenizer or "gpt2")
    splits = {shard.split for shard in index.shards}
    for split in ("train", "val", "test"):
        if split not in splits:
            continue
        if index.masked:
            yield from _show_masked(folder, index, split, decoder)
            continue
        for number, (ids, whole) in enumerate(_first_documents(folder, split, decoder.eot_id), 1):
            text = decoder.decode(ids)
            more = "" if whole and len(text) <= CHARACTERS else " …"
            yield f"── {split}, document {number}: {len(ids):,} tokens{'' if whole else ' and more'} ──"
            yield text[:CHARACTERS] + more


def _show_masked(folder: str, index: ShardIndex, split: str, decoder: Tokenizer) -> Iterator[str]:
    """The first documents of a split whose tokens have a mask, a heading before each."""
    tokens = open_tokens(folder, split)
    marks = TokenStream(mask_index(index), split, lambda shard: Path(folder) / shard.name, local=True)
    starts, lengths = find_documents(marks)
    for number, (start, length) in enumerate(zip(starts[:DOCUMENTS].tolist(), lengths.tolist()), 1):
        shown = min(length, WINDOW)
        counts = (marks.read(start, shown) & COUNTS).astype(bool)
        total = int(np.count_nonzero(marks.read(start, length) & COUNTS))
        text = masked_text(tokens.read(start, shown), counts, decoder)
        yield f"── {split}, document {number}: {length:,} tokens, {total:,} count ──"
        yield text[:CHARACTERS] + ("" if shown == length and len(text) <= CHARACTERS else " …")


def masked_text(ids: Tokens, counts: np.ndarray, decoder: Tokenizer) -> str:
    """Text of ids (n,) with special tokens by name, and ⟦ ⟧ around what `counts`, (n,) bool."""
    names = {number: name for name, number in decoder.specials.items()}
    text = ""
    for counted, stretch in groupby(zip(ids.tolist(), counts.tolist()), key=itemgetter(1)):
        parts = groupby((number for number, _ in stretch), key=names.get)
        shown = "".join(decoder.decode(some) if name is None else name * len(list(some)) for name, some in parts)
        text += f"⟦{shown}⟧" if counted else shown
    return text


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


def summary(index: ShardIndex) -> str:
    """Documents, bytes, tokens and bytes per token, by split and in all."""
    lines = [f"{'':<6}{'documents':>12}{'bytes':>18}{'tokens':>18}{'bytes/token':>13}"]
    for name in ("train", "val", "all"):
        shards = index.shards if name == "all" else index.split(name)
        documents, size = sum(shard.documents for shard in shards), sum(shard.text_bytes for shard in shards)
        tokens = sum(shard.tokens for shard in shards)
        lines.append(f"{name:<6}{documents:>12,}{size:>18,}{tokens:>18,}{size / max(tokens, 1):>13.3f}")
    return "\n".join(lines)
