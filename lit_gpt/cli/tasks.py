"""The questions of `validate --tasks`, read and checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import Namespace

from lit_gpt.console.messages import note
from lit_gpt.data.task_batches import TaskDataModule
from lit_gpt.data.tasks import Question, ScoredText, encode_questions, read_questions
from lit_gpt.errors import UserError
from lit_gpt.model.config import GPTConfig
from lit_gpt.tokenizer.ids import id_outside
from lit_gpt.tokenizer.tokenizer import Tokenizer
from lit_gpt.train.rank_zero import is_rank_zero
from lit_gpt.train.task_metric import TaskMetric


class TaskValidation:
    """A `validate` with questions in place of text.

    Attributes:
        data: their texts, for the Trainer.
        metric: their figures.
    """

    def __init__(self, options: Namespace, config: GPTConfig, tokenizer: Tokenizer | None) -> None:
        """The questions that `options` names, for a model of shape `config`.

        Raises:
            UserError: they cannot be read, or not be scored with this model; or only some of them would be.
        """
        path, limit = options.tasks, options.trainer.limit_val_batches
        if tokenizer is None:
            raise UserError(f"--tasks {path}: this model came without a tokenizer and can read no text: leave it out")
        if options.trainer.fast_dev_run or isinstance(limit, int) or limit not in (None, 1.0):
            name = "fast_dev_run" if options.trainer.fast_dev_run else "limit_val_batches"
            raise UserError(f"trainer.{name}={options.trainer[name]}: --tasks scores every question: leave it out")
        questions = read_questions(path)
        texts = encode_questions(questions, tokenizer, config.block_size)
        wrong = id_outside([token for text in texts for token in text.ids], config.vocab_size)
        if wrong is not None:
            raise UserError(
                f"--tasks {path}: the model's tokenizer gives id {wrong}, its vocabulary ends at "
                f"{config.vocab_size - 1}: name a checkpoint with the tokenizer that it was trained with"
            )
        if is_rank_zero():
            note(_report(path, questions, texts, config.block_size))
        self.data = TaskDataModule(texts, options.data.batch_size)
        self.metric = TaskMetric(questions)


def _report(path: str, questions: Sequence[Question], texts: Sequence[ScoredText], block_size: int) -> str:
    """What there is to do, and how many texts lose their beginning, in one line."""
    cloze, cut = sum(question.gold is None for question in questions), sum(text.is_cut for text in texts)
    report = f"{path}: {len(questions) - cloze:,} questions with choices, {cloze:,} cloze texts"
    report += f", {len(texts):,} continuations to score"
    if not cut:
        return report
    return f"{report}; {cut:,} are longer than the context of {block_size} and lose their beginning"
