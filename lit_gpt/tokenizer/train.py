"""Tokenizers trained on text: byte-pair merges (`bpe:4096`) and characters (`char`)."""

from __future__ import annotations

from collections.abc import Iterable

from lit_gpt.errors import UserError
from lit_gpt.tokenizer.tokenizer import CHARACTERS, END_OF_TEXT, EVERY_BYTE, Tokenizer, byte_alphabet, is_trained

# GPT-2's rule for words. Possessive quantifiers only keep the engine from backtracking; the pieces are the same.
WORDS = r"'(?:[dmst]|ll|re|ve)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s+(?!\S)|\s+"


def train_tokenizer(spec: str, texts: Iterable[str]) -> Tokenizer:
    """Make "char" or "bpe:N" from `texts`, which are read once.

    "char" has a token for each character that occurs and one for each byte, so that any other character is its
    UTF-8 bytes. "bpe:N" has at most N tokens, fewer where the texts have no N pairs that occur twice.

    >>> train_tokenizer("char", ["你好"]).encode("你 好")
    [256, 32, 257]

    Raises:
        UserError: another spec.
    """
    if not is_trained(spec):
        raise UserError(f'tokenizer "{spec}" is not made from text; "char" and "bpe:4096" are')
    if spec == "char":
        return _train_characters(texts)
    return _train_merges(spec, int(spec[4:]), texts)


def _train_characters(texts: Iterable[str]) -> Tokenizer:
    characters: set[str] = set()
    for text in texts:
        characters.update(text)
    wide = sorted(character for character in characters if ord(character) > 127)
    tokens = EVERY_BYTE + [character.encode() for character in wide]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Tokenizer.build("char", CHARACTERS, ranks, {END_OF_TEXT: len(ranks)})


def _train_merges(spec: str, size: int, texts: Iterable[str]) -> Tokenizer:
    """Byte-pair merges by the `tokenizers` library; the ranks are its ids, so both give the same ids for a text."""
    from tokenizers import Tokenizer as Trainable
    from tokenizers import models, pre_tokenizers, trainers

    trainable = Trainable(models.BPE())
    trainable.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    trainable.train_from_iterator(texts, trainer)
    byte_of = byte_alphabet()
    ranks = {bytes(byte_of[letter] for letter in token): id for token, id in trainable.get_vocab().items()}
    return Tokenizer.build(spec, WORDS, ranks, {END_OF_TEXT: len(ranks)})
