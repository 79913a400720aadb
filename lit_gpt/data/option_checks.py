"""Checks of the data's options, which need no data: each error is one line that names the option and the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_gpt.data.index import TEXT
from lit_gpt.data.mixture import Mixture
from lit_gpt.data.remote import is_remote
from lit_gpt.errors import UserError, brief


def check_options(options: Any) -> None:
    """Refuse values that no data could have, and options that mean nothing together.

    Args:
        options: those of `TokenDataModule`, by attribute.

    Raises:
        UserError: naming the first.
    """
    for name in ("batch_size", "block_size", "shuffle_tokens", "cache_gb"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            raise UserError(f"data.{name}={value} must be positive")
    of_documents = options.rows == "documents"
    if of_documents and options.format != TEXT:
        raise UserError(f"data.rows=documents is for text, {options.format} has rows of its own: leave it out")
    if of_documents and options.path is not None and is_remote(options.path):
        raise UserError(f"data.rows=documents reads all tokens: fetch {options.path} into a folder, or leave rows out")
    if options.attend_across and options.format != "chat" and not of_documents:
        what = "text without data.rows documents" if options.format == TEXT else options.format
        raise UserError(f"data.attend_across is for conversations, not for {what}: leave it out")
    if options.shuffle_tokens is not None and (of_documents or options.format != TEXT):
        what = "rows of documents" if of_documents else "conversations"
        raise UserError(f"data.shuffle_tokens is for text, all {what} are shuffled together: leave it out")


def checked_mixture(options: Any, weights: Mapping[str, float] | None) -> Mixture | None:
    """The mixture of these weights, if there are any; the other options as of `check_options`.

    Raises:
        UserError: it cannot be mixed, or there is nothing to validate on.
    """
    if weights is None:
        return None
    if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
        raise UserError(f"data.mixture={brief(weights)} names no folders: write {{FOLDER: WEIGHT, …}}, or leave it out")
    if options.path is None:
        raise UserError(
            "data.mixture is for training: give --data.path too, whose tokenizer and validation data are used, "
            "such as one of the mixture's"
        )
    if options.format == "pairs":
        raise UserError("data.mixture is for text and conversations, not for pairs: leave it out")
    for name in filter(is_remote, weights):
        raise UserError(f"data.mixture: {name} is an address: fetch its shards into a folder, and name that")
    return Mixture(weights)


def check_divisible(batch_size: int, ranks: int) -> None:
    """Refuse a training batch that can't be divided evenly among `ranks`. Raises UserError with one that can."""
    if batch_size % ranks:
        raise UserError(
            f"data.batch_size={batch_size} can't be divided among {ranks} ranks: take {-(-batch_size // ranks) * ranks}"
        )
