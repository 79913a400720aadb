"""Shape, vocabulary and dropout for a text of one's own: from its length, the time that there is, and the machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from lit_gpt.model.config import GPTConfig, preset_values

BASE = "nano"
"""The preset that is made smaller or larger."""
HEAD = 64
SHAPES = ((4, 128), (3, 192), (6, 192), (6, 256), (6, 384), (8, 512))
"""Layers and widths: the blocks of each have about twice the weights of the one before."""
_REACHED = 0.28
"""Of the rate of large products, by training: 1,060 steps of 4 × 128 in 165 s where products reach 400 GFLOP/s."""
_WEIGHTS_PER_ROOT = 0.2
"""Weights of the blocks = this · √FLOP: of the shapes that were tried the lowest loss had 4 × 128 with 1.7e13 FLOP and
3 × 192 with 3.5e13."""
_BYTES_PER_TOKEN = 3.0
"""Of text in a vocabulary of its own, about: to tell how often the text will be read."""
_DROPOUT = ((16.0, 0.2), (4.0, 0.1))
"""From so many epochs on, this dropout: without it a model memorises the text. There is none on attention weights, of
which there are so many that a step on a CPU would be much longer."""


@dataclass(frozen=True)
class TextPlan:
    """What `model.preset: auto` stands for.

    Attributes:
        config: fields of the model's configuration, all but the vocabulary's size.
        vocabulary: tokens of the text's tokenizer, or of the byte pair encoding to train on it.
        reason: one line about the choice.
    """

    config: dict[str, Any]
    vocabulary: int
    reason: str


def plan_for_text(
    text_bytes: int, seconds: float, flops: float, vocabulary: int | None = None, characters: int = 0
) -> TextPlan:
    """The shape whose loss is lowest after a run of this length, of those in `SHAPES`.

    For a given number of operations there is a best number of weights, which grows as their root (Hoffmann et al.,
    arXiv 2203.15556): a larger model sees too little text, a smaller one cannot hold what it sees.

    Args:
        text_bytes: UTF-8 bytes of the text to train on.
        seconds: for training.
        flops: FLOP/s that large matrix products reach.
        vocabulary: where the text has a tokenizer already, its tokens.
        characters: different ones in the text.
    """
    vocabulary = vocabulary or vocabulary_for(text_bytes, characters)
    operations = _REACHED * flops * seconds
    wanted = _WEIGHTS_PER_ROOT * math.sqrt(operations)
    known = [_config(*shape, vocabulary) for shape in SHAPES]
    config = min(known, key=lambda one: abs(math.log(_block_weights(one) / wanted)))
    tokens = operations / (3 * config.forward_flops_per_token(config.block_size))
    epochs = tokens * _BYTES_PER_TOKEN / text_bytes
    dropout = next((share for many, share in _DROPOUT if epochs >= many), 0.0)
    fields = {**preset_values(BASE), "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd}
    reason = (
        f"{text_bytes / 1e6:.2g} MB of text, {seconds:.0f} s at {_REACHED * flops / 1e9:.0f} GFLOP/s: "
        f"{config.n_layer} layers × {config.n_embd} ({config.least_weights() / 1e6:.1f} M weights, about "
        f"{tokens / 1e6:.1f} M tokens or {epochs:.2g} epochs of training), a vocabulary of {vocabulary}, "
        f"dropout {dropout}"
    )
    return TextPlan({**fields, "dropout": dropout, "attn_dropout": 0.0}, vocabulary, reason)


def vocabulary_for(text_bytes: int, characters: int = 0) -> int:
    """Tokens of a byte pair encoding for so much text: about twice the root of its bytes, a power of two.

    Longer tokens make rows of more text, but each is seen less often. A text of many `characters`, as Chinese is, gets
    about as many tokens at least, or most characters would be written as several.
    """
    wanted = max(2 * math.sqrt(max(1, text_bytes)), characters)
    return min(8192, max(512, 2 ** round(math.log2(wanted))))


def _block_weights(config: GPTConfig) -> int:
    return config.least_weights() - config.vocab_size * config.n_embd


def _config(n_layer: int, n_embd: int, vocabulary: int) -> GPTConfig:
    values = {**preset_values(BASE), "n_layer": n_layer, "n_embd": n_embd, "n_head": n_embd // HEAD}
    return GPTConfig.from_dict({**values, "vocab_size": vocabulary})
