"""The figures of training on answers: how many tokens count, and whether the first token of each answer is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX, Batch
from lit_gpt.model.gpt import GPT
from lit_gpt.train.lm_metrics import LanguageModelMetric, count_bytes


def learns_answers(trainer: Any) -> bool:
    """Whether the data of a Trainer are conversations, of which only what the assistant says counts.

    `Any`: a data module of another kind has no format, and is text.
    """
    return _format(trainer) != "text"


def learns_pairs(trainer: Any) -> bool:
    """Whether they are pairs of conversations, of which one is preferred; `Any` as above."""
    return _format(trainer) == "pairs"


def _format(trainer: Any) -> str:
    return getattr(getattr(trainer, "datamodule", None), "format", "text")


def token_loss(model: GPT, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy of one micro-batch, and how many targets count in it."""
    idx, targets, documents = Batch(*batch)
    output = model(idx, targets, documents=documents)
    return output.loss_sum / output.n_targets.clamp(min=1), output.n_targets  # in one, perhaps, nothing counts


def answer_step_figures(counted: Tensor, batch: Batch, trainer: Any) -> dict[str, Tensor]:
    """What the log gets of one optimizer step in which `counted` targets of all ranks count."""
    positions = batch[1].numel() * trainer.accumulate_grad_batches * trainer.world_size
    return {"train/counted_tokens": counted, "train/counted_share": counted / positions}


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

    def count(self, model: GPT, batch: Batch, byte_lengths: Tensor | None, of_answers: bool) -> None:
        """Run the model on one batch, and add it.

        Args:
            model: to be judged.
            batch: of text or of conversations.
            byte_lengths: (V,) of the tokens, None where they are not known.
            of_answers: whether the figures of answers are wanted.
        """
        idx, targets, documents = Batch(*batch)
        first = first_answer_targets(targets) if of_answers else None
        output = model(idx, targets, documents=documents, predict_at=first)
        self.update(
            output.loss_sum, output.n_targets, 0 if byte_lengths is None else count_bytes(targets, byte_lengths)
        )
        if first is not None:
            self.update_answers(output.predicted, targets[first], targets.numel())

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
