"""The loss of Direct Preference Optimization, against the paper's equation written out in float64, and TRL's."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from models import tiny_gpt
from torch import Tensor

from lit_gpt.batch import IGNORE_INDEX, PairBatch
from lit_gpt.errors import UserError
from lit_gpt.model.gpt import GPT
from lit_gpt.train.dpo import DPOConfig, answer_logprobs, batch_figures, pair_figures

Pair = tuple[list[int], list[int], list[int]]
"""Ids of a prompt, a chosen and a rejected answer."""

ROWS: list[list[Pair]] = [
    [([1, 2, 3], [4, 5], [6]), ([7], [8, 9, 10, 11], [12, 13, 14])],
    [([20, 21, 22, 23], [24], [25, 26, 27])],
]


def batch_of(rows: list[list[Pair]], reference: Tensor, length: int = 32) -> PairBatch:
    idx = torch.zeros(len(rows), length, dtype=torch.int64)
    targets = torch.full_like(idx, IGNORE_INDEX)
    documents = torch.full_like(idx, -1)
    numbers = torch.full((len(rows), max(map(len, rows))), -1)
    count = 0
    for row, pairs in enumerate(rows):
        start = 0
        for index, (prompt, *answers) in enumerate(pairs):
            numbers[row, index], count = count, count + 1
            for side, answer in enumerate(answers):
                ids = torch.tensor(prompt + answer)
                end = start + len(ids)
                idx[row, start:end] = ids
                documents[row, start:end] = 2 * index + side
                targets[row, start + len(prompt) - 1 : end - 1] = ids[len(prompt) :]
                start = end
    whole = torch.full((*numbers.shape, 2), math.nan, dtype=reference.dtype)
    whole[numbers >= 0] = reference
    return PairBatch(idx, targets, documents, numbers, whole)


def found_alone(model: GPT, row: list[Pair]) -> Tensor:
    with torch.no_grad():
        return torch.stack([torch.stack([logprob_alone(model, p, y) for y in (c, r)]) for p, c, r in row])


def logprob_alone(model: GPT, prompt: list[int], answer: list[int]) -> Tensor:
    """log p(answer | prompt), each conversation in a pass of its own."""
    ids = torch.tensor([prompt + answer])
    logits = model(ids).logits
    assert logits is not None
    logprobs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logprobs.gather(1, torch.tensor(answer)[:, None]).sum()


def expected_loss(model: GPT, reference: GPT, beta: float) -> Tensor:
    """-E log σ(β log π(y_w|x)/π_ref(y_w|x) - β log π(y_l|x)/π_ref(y_l|x)), equation 7 of the paper."""
    terms = []
    for prompt, chosen, rejected in (pair for row in ROWS for pair in row):
        ratio = [logprob_alone(model, prompt, y) - logprob_alone(reference, prompt, y) for y in (chosen, rejected)]
        terms.append(-torch.log(1 / (1 + torch.exp(-(beta * ratio[0] - beta * ratio[1])))))
    return torch.stack(terms).mean()


def reference_table(model: GPT) -> Tensor:
    with torch.no_grad():
        table = answer_logprobs(model, batch_of(ROWS, torch.zeros(3, 2)))
    return table[batch_of(ROWS, torch.zeros(3, 2)).numbers >= 0]


@pytest.mark.parametrize("shape", [{}, {"position": "rope", "n_kv_head": 2}], ids=["gpt2", "grouped, rotary"])
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_loss_and_gradient_are_those_of_the_paper(shape: dict[str, object], beta: float) -> None:
    model, reference = tiny_gpt(0, **shape), tiny_gpt(1, **shape)
    expected = expected_loss(model, reference, beta)
    wanted = torch.autograd.grad(expected, list(model.parameters()))

    loss = batch_figures(model, batch_of(ROWS, reference_table(reference)), DPOConfig(beta=beta)).loss.mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(model.parameters())), wanted)


def test_log_probabilities_of_rows_are_those_of_each_answer_alone() -> None:
    model = tiny_gpt()
    found = answer_logprobs(model, batch_of(ROWS, torch.zeros(3, 2)))
    assert found.shape == (2, 2, 2)
    torch.testing.assert_close(found[0].detach(), found_alone(model, ROWS[0]))
    torch.testing.assert_close(found[1, :1].detach(), found_alone(model, ROWS[1]))
    assert not found[1, 1].any()  # there is no pair


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_loss_is_trl_s_with_label_smoothing(smoothing: float) -> None:
    """DPOTrainer.dpo_loss of TRL for loss_type "sigmoid", as it stands there."""
    torch.manual_seed(3)
    policy, reference = torch.randn(2, 50, 2, dtype=torch.float64) * 20 - 30
    beta = 0.3
    logratios = policy[:, 0] - policy[:, 1]
    ref_logratios = reference[:, 0] - reference[:, 1]
    logits = logratios - ref_logratios
    losses = -F.logsigmoid(beta * logits) * (1 - smoothing) - F.logsigmoid(-beta * logits) * smoothing
    chosen_rewards = beta * (policy[:, 0] - reference[:, 0])
    rejected_rewards = beta * (policy[:, 1] - reference[:, 1])

    figures = pair_figures(policy, reference, DPOConfig(beta, smoothing))
    torch.testing.assert_close(figures.loss, losses)
    torch.testing.assert_close(figures.chosen, chosen_rewards)
    torch.testing.assert_close(figures.rejected, rejected_rewards)


def test_model_that_is_its_own_reference_has_a_loss_of_ln_2() -> None:
    model = tiny_gpt()
    figures = batch_figures(model, batch_of(ROWS, reference_table(model).float()), DPOConfig())
    torch.testing.assert_close(figures.loss, torch.full((3,), math.log(2), dtype=torch.float64), rtol=1e-5, atol=0)


def test_large_margins_stay_finite() -> None:
    far = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    figures = pair_figures(far, torch.zeros(2, 2), DPOConfig(beta=1.0))
    (gradient,) = torch.autograd.grad(figures.loss.sum(), [far])
    assert figures.loss.tolist() == [0.0, 2e4]
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beta": 0.0}, "dpo.beta=0.0 must be a finite number above 0"),
        ({"beta": math.inf}, "dpo.beta=inf must be"),
        ({"beta": math.nan}, "dpo.beta=nan must be"),
        ({"label_smoothing": 0.5}, r"dpo.label_smoothing=0.5 must lie in \[0, 0.5\)"),
        ({"label_smoothing": -0.1}, "dpo.label_smoothing=-0.1 must lie"),
    ],
)
def test_bad_settings_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPOConfig(**values)
