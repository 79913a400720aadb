"""The figures of tasks against each text alone in float64, and by formulas written again."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from models import tiny_gpt

from lit_gpt.data.loader import RankShare
from lit_gpt.data.task_batches import TaskLoader
from lit_gpt.data.tasks import Question, ScoredText
from lit_gpt.train.task_metric import TaskMetric, task_figures

CHOICES = ("ab", "你好", "abcdefghi")  # 2, 2 and 9 characters; 2, 6 and 9 bytes


def choices(gold: int) -> Question:
    return Question("", "", tuple(f" {choice}" for choice in CHOICES), CHOICES, gold)


def test_the_figures_by_hand() -> None:
    questions = [choices(1), Question("", "", ("x",)), choices(1), Question("", "", ("y",)), choices(0)]
    first, second, third = [-4.0, -3.0, -13.0], [-4.0, -5.0, -8.0], [-2.0, -8.0, -10.0]
    # by characters: -2, -1.5, -1.44 | -2, -2.5, -0.89 | -1, -4, -1.1; by bytes -2, -0.5, -1.44 | -2, -0.8, -0.89 | …
    loglikelihoods = np.array([*first, -1.5, *second, -0.5, *third])
    greedy = np.array([False] * 3 + [True] + [False] * 3 + [False] + [True] * 3)
    figures = task_figures(questions, loglikelihoods, greedy)
    assert figures["multiple_choice/acc"] == pytest.approx(2 / 3)
    assert figures["multiple_choice/acc_norm"] == pytest.approx(1 / 3)
    assert figures["multiple_choice/acc_bytes"] == 1.0
    assert figures["multiple_choice/acc_stderr"] == pytest.approx(math.sqrt(2 / 9 / 2))
    assert figures["cloze/acc"] == 0.5 and figures["cloze/acc_stderr"] == pytest.approx(0.5)
    assert figures["cloze/log_likelihood"] == -1.0 and figures["cloze/perplexity"] == pytest.approx(math.e)
    assert list(task_figures(questions[1:2], loglikelihoods[3:4], greedy[3:4])) == [
        "cloze/acc", "cloze/log_likelihood", "cloze/perplexity",
    ]  # fmt: skip


def test_equal_scores_go_to_the_first_choice_and_no_number_is_no_answer() -> None:
    figures = task_figures([choices(0)], np.array([-1.0, -1.0, -1.0]), np.zeros(3, bool))
    assert figures["multiple_choice/acc"] == 1.0
    scores = np.array([-1.0, math.nan, -1.0, -1.0, -1.0, -1.0])
    figures = task_figures([choices(0), choices(0)], scores, np.zeros(6, bool))
    assert all(map(math.isnan, figures.values()))


def test_batches_of_any_size_give_what_each_text_alone_gives() -> None:
    model, generator = tiny_gpt(), torch.Generator().manual_seed(1)
    texts, questions, loglikelihoods, greedy = [], [], [], []
    for number in range(23):
        size = int(torch.randint(2, 33, (), generator=generator))
        ids = torch.randint(257, (size,), generator=generator)
        scored = int(torch.randint(1, min(size, 4), (), generator=generator)) if size > 2 else 1
        with torch.no_grad():
            if number % 2:  # what greedy decoding would have written
                for at in range(size - scored, size):
                    ids[at] = model(ids[None, :at]).logits[0, -1].argmax()
            logprobs = model(ids[None, :-1]).logits[0].log_softmax(-1)[-scored:]
        loglikelihoods.append(float(logprobs.gather(1, ids[-scored:, None]).sum()))
        greedy.append(bool((logprobs.argmax(-1) == ids[-scored:]).all()))
        texts.append(ScoredText(ids.tolist(), scored, False))
        questions.append(Question("", "", ("x",)))
    assert 11 <= sum(greedy) < 23
    for rows in (1, 4, 30):
        metric = TaskMetric(questions)
        with torch.no_grad():
            for batch in TaskLoader(texts, RankShare(rows)):
                metric.count(model, batch)
        assert metric.loglikelihoods.tolist() == pytest.approx(loglikelihoods, rel=1e-9)
        assert metric.greedy.tolist() == greedy
        wanted = task_figures(questions, np.array(loglikelihoods), np.array(greedy))
        found = {name: float(value) for name, value in metric.compute().items()}
        assert found == pytest.approx(wanted, rel=1e-9)
