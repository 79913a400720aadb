"""Dropout: as many zeros as asked for, independent of each other; what is kept is PyTorch's to the rounding."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_gpt.model.dropout import Dropout, dropout

N = 400_000


@pytest.mark.parametrize("probability", [0.01, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_share_of_zeros_the_scale_and_the_gradient(dtype: torch.dtype, probability: float) -> None:
    torch.manual_seed(1)
    x = torch.randn(N, dtype=dtype).add_(10).requires_grad_()
    y = dropout(x, probability)
    dropped = y == 0
    deviation = math.sqrt(probability * (1 - probability) / N)
    assert abs(dropped.double().mean().item() - probability) < 5 * deviation
    torch.manual_seed(1)
    theirs = torch.nn.functional.dropout(x, probability)
    assert y.dtype == theirs.dtype
    both = (y != 0) & (theirs != 0)
    assert both.any() and torch.allclose(y[both], theirs[both], rtol=2e-4 if dtype != torch.bfloat16 else 0)
    gradient = torch.randn(N, dtype=dtype)
    (given,) = torch.autograd.grad(y, x, gradient)
    assert (given[dropped] == 0).all()
    assert torch.allclose(given[~dropped], gradient[~dropped] * (1 / (1 - probability)), rtol=1e-2)


def test_elements_are_dropped_independently() -> None:
    torch.manual_seed(2)
    kept = (dropout(torch.ones(N), 0.3) != 0).double() - 0.7
    for apart in (1, 2, 3, 4, 5, 8):  # four share a draw
        correlation = (kept[apart:] * kept[:-apart]).mean().item() / 0.21
        assert abs(correlation) < 5 / math.sqrt(N), apart
    share = (kept.view(-1, 4) > 0).double().mean(0)  # of each of the four
    assert (share - 0.7).abs().max() < 5 * math.sqrt(0.21 / (N / 4))


@given(st.lists(st.integers(0, 5), max_size=3), st.floats(0, 1, exclude_max=True))
def test_any_shape_and_probability(shape: list[int], probability: float) -> None:
    x = torch.ones(shape).t() if len(shape) == 2 else torch.ones(shape)
    torch.manual_seed(3)
    once = dropout(x, probability)
    torch.manual_seed(3)
    assert torch.equal(once, dropout(x, probability)) and once.shape == x.shape
    assert torch.isfinite(once).all() and (once >= 0).all()


def test_without_training_or_probability_nothing_is_done() -> None:
    x = torch.randn(5)
    assert dropout(x, 0.0) is x and Dropout(0.5).eval()(x) is x
    torch.manual_seed(4)
    assert (Dropout(0.5)(torch.ones(64)) == 0).any()


def test_compiled_code_has_pytorchs() -> None:
    compiled = torch.compile(dropout, backend="eager", fullgraph=True)
    torch.manual_seed(5)
    ours = compiled(torch.ones(1000), 0.5)
    torch.manual_seed(5)
    assert torch.equal(ours, torch.nn.functional.dropout(torch.ones(1000), 0.5))
