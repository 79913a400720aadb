"""A model's vocabulary grown: rows for the special tokens that its tokenizer has been given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.tokenizer import Tokenizer

_TABLES = ("wte.weight", "lm_head.weight", "lm_head.bias")
_LARGEST_MULTIPLE = 128
"""Vocabularies are padded to multiples of a power of two up to this; for another number it is not known why."""


def new_special_ids(tokenizer: Tokenizer, base: Tokenizer) -> list[int] | None:
    """The ids that `tokenizer` has and `base` has not, if it is `base` with more special tokens; None if it is not.

    It is where every text has the same ids in both, and every special token of `base` its own id in `tokenizer`.
    """
    names = [name for name in tokenizer.specials if name not in base.specials]
    names.sort(key=lambda name: tokenizer.specials[name])
    try:
        same = (base.with_specials(names, None) if names else base).hash == tokenizer.hash
    except UserError:  # in `base` they cannot be special
        same = False
    return [tokenizer.specials[name] for name in names] if same else None


def grown_config(config: GPTConfig, n_vocab: int) -> GPTConfig:
    """The shape with a vocabulary of at least `n_vocab`; padding stays a multiple of what it is one of."""
    if n_vocab <= config.vocab_size:
        return config
    padded = config.padded_vocab_size
    if padded is not None and padded < n_vocab:
        multiple = min(padded & -padded, _LARGEST_MULTIPLE)
        padded = -(-n_vocab // multiple) * multiple
    return replace(config, vocab_size=n_vocab, padded_vocab_size=padded)


def grow_weights(weights: Mapping[str, Tensor], config: GPTConfig, known: int, new_ids: list[int]) -> dict[str, Tensor]:
    """The weights with rows of the embedding and the head for further ids, which begin as the mean of those there are.

    With the mean a new token is neither likely nor unlikely at first, and what the model says with the others stays
    as it was (Hewitt 2021, "Initializing new word embeddings for pretrained language models"); with small random rows
    its logit of about 0 can be the largest of all.

    Args:
        weights: by the names of `GPT.state_dict`, not changed.
        config: the shape that they shall have.
        known: how many of the first ids have had a meaning so far: their rows are the ones that count.
        new_ids: the ids that get one. Rows past all ids, of a padded vocabulary, begin as the mean too.
    """
    grown = dict(weights)
    for name in _TABLES:
        if name in weights and not (name == "lm_head.weight" and config.tie_embeddings):
            grown[name] = _grown(weights[name], config.vocab_rows, known, new_ids)
    if config.tie_embeddings and "lm_head.weight" in weights:
        grown["lm_head.weight"] = grown["wte.weight"]
    return grown


def _grown(table: Tensor, rows: int, known: int, new_ids: list[int]) -> Tensor:
    """(V, …) → (`rows`, …)."""
    mean = table[:known].mean(0, dtype=torch.float64).to(table.dtype)
    grown = table.new_empty(rows, *table.shape[1:])
    grown[:] = mean
    grown[: len(table)] = table
    grown[new_ids] = mean
    return grown
