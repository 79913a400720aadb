"""The figures of training on answers: how many tokens count, and whether the first token of each answer is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.train.lm_metrics import LanguageModelMetric


def learns_answers(trainer: Any) -> bool:
    """Whether the data of a Trainer are conversations, of which only what the assistant says counts.

    `Any`: a data module of another kind has no format, and is text.
    """
    return getattr(getattr(trainer, "datamodule", None), "format", "text") != "text"


def first_answer_targets(targets: Tensor) -> Tensor:
    """(B, T) bool: where an answer's first token is the target: it counts, and the one before does not."""
    first = targets != IGNORE_INDEX
    first[:, 1:] &= targets[:, :-1] == IGNORE_INDEX
    return first


class AnswerMetric(LanguageModelMetric):
    """The figures of `LanguageModelMetric`, and of answers where some were counted.

    `compute` then also returns `first_token_accuracy`, the share of answers whose first token is the likeliest one,
    `counted_tokens`, and `counted_share`, their part of all positions, padding included.
    """

    answers: Tensor
    right: Tensor
    positions: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("answers", "right", "positions"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update_answers(self, predicted: Tensor, wanted: Tensor, positions: int) -> None:
        """Add one batch.

        Args:
            predicted: (n,) the likeliest id where each of n answers begins.
            wanted: (n,) the first id of each.
            positions: of the batch, B · T.
        """
        self._computed = None  # as torchmetrics does in `update`
        self.answers += wanted.numel()
        self.right += (predicted == wanted).sum()
        self.positions += positions

    def compute(self) -> dict[str, Tensor]:
        """The figures; scalars."""
        figures = super().compute()
        if self.answers > 0:
            figures["first_token_accuracy"] = self.right / self.answers
            figures["counted_tokens"] = self.tokens.double()
            figures["counted_share"] = self.tokens / self.positions
        return figures
