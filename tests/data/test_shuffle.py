"""The shuffled order of samples: a permutation whatever its size, uniform, and different for every seed and epoch."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from lit_gpt.data.shuffle import Shuffle


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    samples=st.integers(2, 150),
    block=st.integers(1, 9),
    extra=st.integers(0, 8),
    window=st.none() | st.integers(1, 200),
    seed=st.integers(-(2**70), 2**70),
    epoch=st.integers(0, 10),
)
def test_every_block_once(samples: int, block: int, extra: int, window: int | None, seed: int, epoch: int) -> None:
    tokens = (samples + 1) * block + extra % block
    order = Shuffle(tokens, block, seed, window)
    assert order.samples == samples
    starts = order.starts(epoch, 0, samples)
    assert np.sort(starts).tolist() == [order.phase(epoch) + block * number for number in range(samples)]
    assert starts.min() >= 0 and starts.max() + block + 1 <= tokens
    assert [int(order.starts(epoch, position, 1)[0]) for position in range(0, samples, 7)] == starts[::7].tolist()
    for position in range(0, samples, 5):  # each sample lies inside the window that is prefetched for it
        first, count = order.span(epoch, position)
        assert first <= starts[position] and starts[position] + block + 1 <= first + count


def test_few_tokens() -> None:
    assert Shuffle(5, 4, 0).starts(0, 0, 1).tolist() == [0]
    assert {int(Shuffle(7, 4, 0).starts(epoch, 0, 1)[0]) for epoch in range(50)} == {0, 1, 2}
    with pytest.raises(ValueError, match="no sample"):
        Shuffle(4, 4, 0)
    with pytest.raises(IndexError):
        Shuffle(5, 4, 0).starts(0, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("samples", [5, 16, 23])
def test_every_place_for_every_sample(samples: int) -> None:
    """Over many epochs each sample comes equally often at the first, the middle and the last position."""
    order = Shuffle(samples + 1, 1, 3)
    orders = np.stack([order.starts(epoch, 0, samples) for epoch in range(600)])
    for position in (0, samples // 2, samples - 1):
        assert chisquare(np.bincount(orders[:, position], minlength=samples)).pvalue > 1e-4


def test_neighbours_are_as_random_as_numpys() -> None:
    order = Shuffle(10_001, 1, 0).starts(0, 0, 10_000)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.04


def test_seed_and_epoch_are_two_things() -> None:
    orders = {
        (seed, epoch): tuple(Shuffle(101, 1, seed).starts(epoch, 0, 100)) for seed in range(4) for epoch in range(4)
    }
    assert len(set(orders.values())) == 16
    phases = {Shuffle(10**6, 1000, 1).phase(epoch) for epoch in range(100)}
    assert len(phases) > 80


def test_a_window_is_finished_before_the_next() -> None:
    order = Shuffle(1001, 1, 0, window_tokens=64)
    windows = order.starts(0, 0, 1000) // 64
    visits = [int(windows[0])] + [int(new) for old, new in pairwise(windows) if old != new]
    assert sorted(visits) == list(range(16)) and visits != sorted(visits)


def test_no_memory_for_a_hundred_billion_tokens() -> None:
    order = Shuffle(100_000_000_000, 1, 0)
    starts = order.starts(3, order.samples - 1000, 1000)
    assert len(set(starts.tolist())) == 1000 and starts.max() > 9e10
