"""Checks of prompts and of token ids against a model: its vocabulary, its context, its end-of-text."""

from __future__ import annotations

from collections.abc import Sequence

from lit_gpt.errors import UserError
from lit_gpt.generation.generation_config import GenerationConfig
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.ids import id_outside
from lit_gpt.tokenizer.tokenizer import Tokenizer


def vocabulary_size(config: GPTConfig, tokenizer: Tokenizer | None) -> int:
    """V: the ids 0 … V - 1 are those that a prompt, a setting or a continuation may have.

    A model may have more rows than its tokenizer has ids (a padded vocabulary). Such a row was never trained and its id
    is no text, so it is refused in prompts too: then every id that reaches a sampler has a column in the logits.
    """
    return config.vocab_size if tokenizer is None else min(config.vocab_size, tokenizer.n_vocab)


def check_prompt(
    name: str,
    ids: Sequence[int],
    config: GPTConfig,
    generation_config: GenerationConfig,
    tokenizer: Tokenizer | None,
) -> list[int]:
    """The ids that generation starts from: the prompt, or end-of-text if it is empty.

    Args:
        name: of the prompt, for messages.
        ids: its ids.
        config: the model's shape.
        generation_config: how to continue it.
        tokenizer: for end-of-text, and for which ids there are; None for a model of bare ids.

    Raises:
        UserError: for a prompt that this model cannot continue.
    """
    eot_id = None if tokenizer is None else tokenizer.eot_id
    if not ids and eot_id is None:
        raise UserError(f"{name} is empty and the tokenizer has no end-of-text to start from: write a prompt")
    prompt = list(ids) if ids or eot_id is None else [eot_id]
    check_ids(name, prompt, vocabulary_size(config, tokenizer))
    if generation_config.overflow == "stop" and len(prompt) > config.block_size:
        raise UserError(
            f"{name} has {len(prompt)} tokens, the model's context is {config.block_size}: "
            f"shorten it, or use overflow slide"
        )
    return prompt


def check_ids(name: str, ids: Sequence[int], n_vocab: int) -> None:
    """Refuse ids that are not in 0 … `n_vocab` - 1; `name` is what has them. Raises UserError."""
    wrong = id_outside(ids, n_vocab)
    if wrong is not None:
        raise UserError(f"{name} has token id {wrong}, outside the vocabulary of {n_vocab}: use ids 0 … {n_vocab - 1}")
