"""The metrics of a validation or a test: one for each kind of batch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_gpt.batch import Batch, PairBatch
from lit_gpt.data.task_batches import TaskBatch
from lit_gpt.model.gpt import GPT
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.answers import AnswerMetric
from lit_gpt.train.dpo import DPOConfig, PairMetric
from lit_gpt.train.lm_metrics import byte_lengths
from lit_gpt.train.task_metric import TaskMetric


class ValidationMetrics(nn.Module):
    """A module, so that the metrics follow the model from device to device.

    Attributes:
        tasks: of the questions that are asked in place of text, if there are any.
    """

    tasks: TaskMetric | None

    def __init__(self, dpo: DPOConfig) -> None:
        """The metrics of text, conversations and pairs; `dpo` is of the last."""
        super().__init__()
        self.text, self.pairs = AnswerMetric(), PairMetric()
        self.tasks = None
        self._dpo = dpo
        self._byte_lengths: Tensor | None = None

    def start(self, tokenizer: Tokenizer | None, vocab_size: int, device: torch.device) -> None:
        """Start counting anew.

        Args:
            tokenizer: what the ids mean, None for bare ids, whose bytes are not known.
            vocab_size: of the model.
            device: where the batches are.
        """
        for metric in (self.text, self.pairs, self.tasks):
            if metric is not None:
                metric.reset()
        if tokenizer is not None and self._byte_lengths is None:
            self._byte_lengths = byte_lengths(tokenizer, vocab_size).to(device)

    def count(self, model: GPT, batch: Batch | PairBatch | TaskBatch, of_answers: bool) -> None:
        """Run the model on one batch, and add it; `of_answers` as of `AnswerMetric.count`."""
        if isinstance(batch, TaskBatch):
            assert self.tasks is not None
            self.tasks.count(model, batch)
        elif isinstance(batch, PairBatch):
            self.pairs.count(model, batch, self._dpo)
        else:
            self.text.count(model, batch, self._byte_lengths, of_answers)

    def compute(self, of_pairs: bool) -> dict[str, Tensor]:
        """The figures over all batches of all ranks; scalars.

        Args:
            of_pairs: whether the data are pairs of answers.
        """
        metric = self.pairs if of_pairs else self.text if self.tasks is None else self.tasks
        figures: dict[str, Tensor] = metric.compute()
        return figures
