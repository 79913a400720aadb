"""A strategy's request for a part of one forward pass, and the result it is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_gpt.generation.sampling import Sampler
from lit_gpt.generation.slots import CachedSequence


@dataclass(eq=False, slots=True)
class ForwardRequest:
    """Tokens of one sequence to compute, and the result.

    Attributes:
        sequence: the sequence.
        tokens: ids to append to it first; none for a sequence that was opened with its prompt.
        num_logits: how many of the last tokens' logits to give.
        hidden: give their hidden states too.
        sampler: choose the next token with it; all sequences of a forward pass are chosen for together.
        num_scheduled: how many of its tokens the next forward pass computes, as the scheduler decided.
        logits: (num_logits, V), once done.
        states: (num_logits, C) hidden states after the final norm, once done and if asked for.
        choice: the chosen token, once done and if asked for.
        done: whether all of it is computed.
    """

    sequence: CachedSequence
    tokens: Sequence[int] = ()
    num_logits: int = 1
    hidden: bool = False
    sampler: Sampler | None = None
    num_scheduled: int = 0
    logits: Tensor = field(default_factory=lambda: torch.empty(0))
    states: Tensor = field(default_factory=lambda: torch.empty(0))
    choice: int = -1
    done: bool = False
