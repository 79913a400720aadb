"""Direct Preference Optimization (Rafailov et al. 2023, arXiv 2305.18290): the loss of pairs of answers.

Axes: B rows, T tokens, P pairs of a row; in the last axis of 2 the chosen answer comes before the rejected one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_gpt.batch import PairBatch
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT
from lit_gpt.train.lm_metrics import SumMetric


@dataclass(frozen=True)
class DPOConfig:
    """How strongly pairs move the model; for `data.format: pairs`.

    Attributes:
        beta: of the paper's equation 7: the larger, the closer the model stays to what it was at the start.
        label_smoothing: the share of pairs that are thought to be the wrong way round (arXiv 2310.12036 calls the loss
            with it conservative DPO).
    """

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        """Check both values. Raises UserError, naming the value and the remedy."""
        if not 0 < self.beta < math.inf:
            raise UserError(f"dpo.beta={self.beta} must be a finite number above 0, such as 0.1")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"dpo.label_smoothing={self.label_smoothing} must lie in [0, 0.5), such as 0 or 0.1")


class PairFigures(NamedTuple):
    """Figures of n pairs, each (n,): the loss in nats, and the rewards of the chosen and of the rejected answer."""

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def answer_logprobs(model: GPT, batch: PairBatch) -> Tensor:
    """(B, P, 2) log-probability of each answer as a whole, in nats; 0 where a row has fewer pairs."""
    losses = model(batch.idx, batch.targets, documents=batch.documents, each_target=True).losses  # (B, T)
    answers = torch.arange(2 * batch.numbers.size(1), device=losses.device)
    inside = batch.documents[:, None] == answers[:, None]  # (B, 2 P, T)
    return -(losses[:, None] * inside).sum(-1).unflatten(1, (-1, 2))


def pair_figures(logprobs: Tensor, reference: Tensor, config: DPOConfig) -> PairFigures:
    """Equation 7, pair by pair.

    Args:
        logprobs: (n, 2) of the answers, by the model in training.
        reference: (n, 2) of the same answers, by the model at the start.
        config: beta and label smoothing.
    """
    rewards = config.beta * (logprobs - reference)
    margin = rewards[:, 0] - rewards[:, 1]
    smoothing = config.label_smoothing
    loss = -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
    return PairFigures(loss, *rewards.unbind(1))


def batch_figures(model: GPT, batch: PairBatch, config: DPOConfig) -> PairFigures:
    """Figures of the pairs that a batch has, row by row."""
    present = batch.numbers >= 0
    return pair_figures(answer_logprobs(model, batch)[present], batch.reference[present], config)


def pair_loss(model: GPT, batch: PairBatch, config: DPOConfig) -> tuple[Tensor, Tensor]:
    """The mean loss of the pairs of one micro-batch, and (5,) sums over them: see `_sums`."""
    figures = batch_figures(model, batch, config)
    return figures.loss.sum() / max(1, len(figures.loss)), _sums(figures)


def _sums(figures: PairFigures) -> Tensor:
    """(5,) float32: the number of pairs, and the sums of loss, right order, chosen's and rejected's rewards."""
    loss, chosen, rejected = (values.detach().float() for values in figures)
    right = (chosen > rejected).float()
    return torch.stack([loss.new_tensor(len(loss)), loss.sum(), right.sum(), chosen.sum(), rejected.sum()])


def _means(sums: Tensor) -> dict[str, Tensor]:
    """The figures of pairs by name, from sums over them."""
    loss, right, chosen, rejected = (sums[1:] / sums[0]).unbind()
    return {
        "loss": loss,
        "reward_accuracy": right,
        "reward_margin": chosen - rejected,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
    }


def pair_step_figures(sums: Tensor) -> dict[str, Tensor]:
    """What the log gets of one optimizer step, from the sums over its pairs on all ranks; the loss is there already."""
    figures = {f"train/{name}": value for name, value in _means(sums).items() if name != "loss"}
    return {**figures, "train/pairs": sums[0]}


class PairMetric(SumMetric):
    """Means over all pairs of a split: `loss`, `reward_accuracy`, `reward_margin`, `reward_chosen`, `reward_rejected`.

    A reward is beta · (log-probability - the reference model's); accuracy is the share of pairs whose chosen answer has
    the larger one.
    """

    sums: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("sums", torch.zeros(5, dtype=torch.float64), dist_reduce_fx="sum")

    def count(self, model: GPT, batch: PairBatch, config: DPOConfig) -> None:
        """Run the model on one batch, and add its pairs."""
        self.update(batch_figures(model, batch, config))

    def update(self, figures: PairFigures) -> None:
        """Add some pairs."""
        self.sums += _sums(figures)

    def compute(self) -> dict[str, Tensor]:
        """The figures; scalars, in fp64."""
        return _means(self.sums)
