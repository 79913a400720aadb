"""The figures of questions with choices and of cloze texts, by lm-evaluation-harness' names and formulas (0.4.13)."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX
from lit_gpt.data.task_batches import TaskBatch
from lit_gpt.data.tasks import Question
from lit_gpt.model.gpt import GPT
from lit_gpt.train.lm_metrics import SumMetric

CHOICES, CLOZE = "multiple_choice", "cloze"


class TaskMetric(SumMetric):
    """The log-likelihood of each text, and whether the model would have written it; the figures that follow from them.

    Each text is scored once, on any rank: the sums over the ranks are the values.
    """

    loglikelihoods: Tensor
    greedy: Tensor

    def __init__(self, questions: Sequence[Question], **kwargs: Any) -> None:
        """For the texts of `questions`, one for each continuation, in their order."""
        super().__init__(**kwargs)
        self._questions = questions
        texts = sum(len(question.continuations) for question in questions)
        self.add_state("loglikelihoods", torch.zeros(texts, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("greedy", torch.zeros(texts, dtype=torch.int64), dist_reduce_fx="sum")

    def count(self, model: GPT, batch: TaskBatch) -> None:
        """Run the model on one batch, and add it."""
        scored = batch.targets != IGNORE_INDEX
        output = model(batch.idx, batch.targets, predict_at=scored, each_target=True)
        differs = torch.zeros_like(scored)
        differs[scored] = output.predicted != batch.targets[scored]
        present = batch.numbers >= 0
        loglikelihoods = -output.losses.to(self.loglikelihoods.dtype).sum(1)
        self.update(batch.numbers[present], loglikelihoods[present], ~differs.any(1)[present])

    def update(self, numbers: Tensor, loglikelihoods: Tensor, greedy: Tensor) -> None:
        """Add some texts.

        Args:
            numbers: (n,) of the texts.
            loglikelihoods: (n,) of their continuations, in nats.
            greedy: (n,) bool, whether each token of the continuation is the likeliest one.
        """
        self.loglikelihoods[numbers] += loglikelihoods
        self.greedy[numbers] += greedy.to(self.greedy.dtype)

    def compute(self) -> dict[str, Tensor]:
        """The figures; scalars, in fp64."""
        loglikelihoods, greedy = self.loglikelihoods.cpu().numpy(), self.greedy.cpu().numpy() > 0
        figures = task_figures(self._questions, loglikelihoods, greedy)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in figures.items()}


def task_figures(
    questions: Sequence[Question], loglikelihoods: npt.NDArray[np.float64], greedy: npt.NDArray[np.bool_]
) -> dict[str, float]:
    """The means over all questions, with their standard errors where there are two questions at least.

    Of choices: `acc`, the share of questions whose right choice is the likeliest; `acc_norm` and `acc_bytes`, the same
    with log-likelihoods divided by the characters and by the UTF-8 bytes of a choice. Of cloze texts: `acc`, the share
    that greedy decoding would have written; `log_likelihood` in nats; and `perplexity`, exp of minus that mean.

    Args:
        questions: n of them.
        loglikelihoods: of all their continuations, in order.
        greedy: whether each of those is what greedy decoding would have written.
    """
    scores: dict[str, list[float]] = defaultdict(list)
    end = 0
    for question in questions:
        start, end = end, end + len(question.continuations)
        if question.gold is None:
            scores[f"{CLOZE}/acc"].append(float(greedy[start]))
            scores[f"{CLOZE}/log_likelihood"].append(float(loglikelihoods[start]))
        else:
            for name, lengths in _choice_lengths(question).items():
                scores[f"{CHOICES}/{name}"].append(_is_right(loglikelihoods[start:end] / lengths, question.gold))
    figures: dict[str, float] = {}
    for name, values in scores.items():
        figures[name] = float(np.mean(values))
        if len(values) > 1:
            figures[f"{name}_stderr"] = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    if f"{CLOZE}/log_likelihood" in figures:
        with np.errstate(over="ignore"):  # infinite, then
            figures[f"{CLOZE}/perplexity"] = float(np.exp(-figures[f"{CLOZE}/log_likelihood"]))
    return figures


def _choice_lengths(question: Question) -> dict[str, npt.NDArray[np.float64]]:
    """Figure → what the log-likelihood of each choice is divided by; the delimiter before it does not count."""
    return {
        "acc": np.ones(len(question.choices)),
        "acc_norm": np.array([float(len(choice)) for choice in question.choices]),
        "acc_bytes": np.array([float(len(choice.encode())) for choice in question.choices]),
    }


def _is_right(scores: npt.NDArray[np.float64], gold: int) -> float:
    """1 if the right choice has the largest score, the first of equal ones; NaN where a score is none."""
    return math.nan if np.isnan(scores).any() else float(scores.argmax() == gold)
