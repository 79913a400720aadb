"""Bits per byte of a text by a model: one figure for all tokenizers, and the same in each window of its bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_gpt.errors import UserError

if TYPE_CHECKING:
    from lit_gpt.api import Generator

WINDOW_BYTES = 1024
"""Of a window of the text, over which the spread is told: the same bytes for every model."""
_MAX_BYTES = 64 << 20
_BATCH_TOKENS = 1 << 13


@dataclass(frozen=True)
class TextScore:
    """How well a model predicts a text.

    Attributes:
        bits_per_byte: over the whole text.
        windows: the same of each `WINDOW_BYTES`, by where a token begins; what is left over is in the last one.
        tokens: predicted.
        bytes: that they stand for.
    """

    bits_per_byte: float
    windows: tuple[float, ...]
    tokens: int
    bytes: int


def read_text(path: str) -> str:
    """The text to compare models on.

    Raises:
        UserError: if it cannot be read, is no UTF-8, is too large, or fewer than two windows.
    """
    file = Path(path).expanduser()
    try:
        size = file.stat().st_size
        if size > _MAX_BYTES:
            raise UserError(f"--text {path} is larger than {_MAX_BYTES >> 20} MiB: a part of it is enough")
        text = file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--text {path} is not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"--text {path}: {error.strerror or error}; name a text file") from error
    if size < 2 * WINDOW_BYTES:
        raise UserError(f"--text {path} has {size} bytes: give at least {2 * WINDOW_BYTES}, two windows")
    return text


def score_text(gpt: Generator, text: str, name: str) -> TextScore:
    """Score `text` in rows of the model's context side by side, each token after those before it in its row.

    Where the tokenizer has an id that begins or ends a text, that one stands before the first token; else the first is
    not predicted.

    Args:
        gpt: the model, in fp32.
        text: to predict.
        name: of the model, for errors.

    Raises:
        UserError: if the model has no tokenizer, or not all of its ids.
    """
    tokenizer = gpt.tokenizer
    if tokenizer is None:
        raise UserError(f"{name} was trained on bare ids and has no tokenizer: leave --text out")
    ids = tokenizer.encode(text)
    start = next((number for number in (tokenizer.bos_id, tokenizer.eot_id) if number is not None), None)
    if start is not None and start < gpt.config.vocab_size:
        ids = [start, *ids]
    if max(ids) >= gpt.config.vocab_size:
        raise UserError(f"{name}: its tokenizer has ids outside of its vocabulary of {gpt.config.vocab_size}")
    lengths = [len(tokenizer.token_bytes(token)) for token in ids]
    return _by_window(_losses(gpt, ids), lengths[1:])


def _losses(gpt: Generator, ids: Sequence[int]) -> list[float]:
    """The cross-entropy of each id but the first, in nats."""
    import torch

    size = gpt.config.block_size
    rows = max(1, _BATCH_TOKENS // size)
    found: list[float] = []
    with torch.inference_mode():
        for first in range(0, len(ids) - 1, rows * size):
            part = torch.tensor(ids[first : first + rows * size + 1], device=gpt.device)
            count = len(part) - 1
            whole = count // size * size
            for begin, end, width in ((0, whole, size), (whole, count, count - whole)):
                if begin < end:
                    idx, targets = part[begin:end].view(-1, width), part[begin + 1 : end + 1].view(-1, width)
                    losses = gpt.model(idx, targets=targets, each_target=True).losses
                    found += losses.flatten().tolist()
    return found


def _by_window(losses: Sequence[float], lengths: Sequence[int]) -> TextScore:
    """Losses in nats and lengths in bytes, of each token, by window."""
    total = sum(lengths)
    count = max(1, total // WINDOW_BYTES)
    nats, sizes, position = [0.0] * count, [0] * count, 0
    for loss, length in zip(losses, lengths):
        window = min(position // WINDOW_BYTES, count - 1)
        nats[window] += loss
        sizes[window] += length
        position += length
    windows = tuple(sum_ / math.log(2) / size for sum_, size in zip(nats, sizes) if size)
    return TextScore(math.fsum(losses) / math.log(2) / total, windows, len(losses), total)
