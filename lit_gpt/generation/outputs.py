"""Outputs of the engine: tokens with their log-probabilities, and pieces of text. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "cancelled", "error"]
"""`stop`: end-of-text, a stop id or a stop string; `length`: max_new_tokens, or the context with overflow stop."""


class Token(NamedTuple):
    """One token, generated or of a prompt.

    Log-probabilities are natural, there if `logprobs` (or `prompt_logprobs`) asked for them, and of two kinds: raw is
    the model's own distribution, processed is after penalties, bias, temperature and filters, as it was drawn from. The
    chosen token's and the top ones come from one tensor, so that equal means equal.
    """

    id: int
    logprob: float | None = None
    processed_logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    processed_top: tuple[tuple[int, float], ...] = ()


@dataclass
class Output:
    """What is new of one continuation.

    Attributes:
        request: the id that `Engine.submit` returned.
        index: which of the request's continuations, 0 … num_samples - 1.
        tokens: generated since the last output; an end-of-text token is among them.
        text: whole characters that are certain by now; the pieces of a continuation, joined, are its text. Text that
            may become a stop string is held back until that is decided. Empty where the engine has no tokenizer.
        finish_reason: None while it goes on.
        score: of a finished beam: sum of log-probabilities / length^length_penalty.
        prompt: the prompt's tokens, once, with the first output of index 0, if `prompt_logprobs` asked for them. The
            first token has no log-probability: nothing came before it.
        error: with finish_reason `error`, one line that says what happened.
    """

    request: int
    index: int = 0
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    score: float | None = None
    prompt: list[Token] | None = None
    error: str | None = None
