"""The judgement: t-intervals against SciPy, their coverage by simulation, and Holm's correction against brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from itertools import permutations

import pytest
from scipy import stats

from lit_gpt.runs.judgement import (
    ALPHA,
    GroupDifference,
    Interval,
    difference,
    holm,
    judge,
    mean_interval,
    remark_on_seeds,
    welch_interval,
)
from lit_gpt.runs.student import critical_t, two_sided_p

DEGREES = [1, 1.5, 2, 3, 4, 7.3, 12, 29, 100, 1000.5, 1e5]
Runs = list[tuple[tuple[str, ...], float]]


@pytest.mark.parametrize("df", DEGREES)
def test_tails_and_quantiles_are_scipys(df: float) -> None:
    for t in (0.0, 1e-6, 0.3, 1.0, 2.5, 6.0, 40.0, 1e4):
        assert two_sided_p(t, df) == pytest.approx(2 * stats.t.sf(t, df), rel=1e-9, abs=1e-300)
        assert two_sided_p(-t, df) == two_sided_p(t, df)
    for alpha in (1.0, 0.9, 0.5, 0.05, 0.05 / 3, 1e-3, 1e-6):
        assert critical_t(alpha, df) == pytest.approx(stats.t.isf(alpha / 2, df), rel=1e-9, abs=1e-12)
    assert two_sided_p(math.inf, df) == 0


def with_seeds(values: Sequence[float], first: int = 0) -> Runs:
    return [((str(first + number),), value) for number, value in enumerate(values)]


def test_intervals_and_p_values_are_scipys() -> None:
    rng = random.Random(1)
    for size, other_size in ((2, 2), (5, 5), (5, 3), (9, 4)):
        one = [rng.gauss(1.0, 0.1) for _ in range(size)]
        other = [rng.gauss(1.05, 0.3) for _ in range(other_size)]
        welch = welch_interval(one, other)
        theirs = stats.ttest_ind(one, other, equal_var=False)
        ends = theirs.confidence_interval(0.95)
        assert welch is not None
        assert (welch.low, welch.high, welch.p) == pytest.approx((ends.low, ends.high, theirs.pvalue), rel=1e-9)
        if size == other_size:
            found = difference(("A", with_seeds(one)), ("B", with_seeds(list(reversed(other)))))
            paired = stats.ttest_rel(one, list(reversed(other)))
            ends = paired.confidence_interval(0.95)
            assert found.paired and found.interval is not None
            assert (found.interval.low, found.interval.high) == pytest.approx((ends.low, ends.high), rel=1e-9)
            assert found.interval.p == pytest.approx(paired.pvalue, rel=1e-9)


def test_runs_are_paired_by_their_seeds_whatever_their_order() -> None:
    one = with_seeds([1.0, 2.0, 4.0])
    other = [one_run for _, one_run in sorted(zip([2, 0, 1], with_seeds([0.9, 1.9, 3.7])))]
    found = difference(("A", one), ("B", other))
    assert found.paired and found.interval is not None
    assert found.mean == pytest.approx(0.5 / 3) and found.interval.df == 2
    assert not difference(("A", one), ("B", with_seeds([0.9, 1.9, 3.7], first=1))).paired
    assert not difference(("A", one), ("B", with_seeds([0.9, 1.9]))).paired
    assert not difference(("A", one), ("B", [*other, other[0]])).paired, "one seed twice is no pair"


SIMULATIONS = 2000


@pytest.mark.slow
@pytest.mark.parametrize("true", [0.0, 0.7])
@pytest.mark.parametrize("kind", ["paired", "unpaired"])
def test_of_2000_simulated_comparisons_the_intervals_cover_the_difference_as_often_as_they_say(
    kind: str, true: float
) -> None:
    rng = random.Random(f"{kind} {true}")
    covered = shown = 0
    for _ in range(SIMULATIONS):
        if kind == "paired":  # a seed is good or bad for both
            of_seed = [rng.gauss(2.0, 1.0) for _ in range(5)]
            one = with_seeds([value + true + rng.gauss(0, 0.5) for value in of_seed])
            other = with_seeds([value + rng.gauss(0, 0.5) for value in of_seed])
        else:
            one = with_seeds([rng.gauss(2.0 + true, 0.5) for _ in range(5)])
            other = with_seeds([rng.gauss(2.0, 1.0) for _ in range(8)], first=5)
        found = difference(("A", one), ("B", other))
        assert found.paired == (kind == "paired") and found.interval is not None
        covered += found.interval.low <= true <= found.interval.high
        shown += holm([found])[0].shown
    assert 0.935 <= covered / SIMULATIONS <= 0.965
    if true == 0:
        assert 0.035 <= shown / SIMULATIONS <= 0.065, "a difference that is not there"
    else:
        assert shown / SIMULATIONS > 0.2


@pytest.mark.slow
def test_of_many_groups_without_a_difference_few_comparisons_show_one() -> None:
    """Without a correction 6 comparisons would show at least one in every fifth simulation."""
    rng = random.Random(7)
    wrong = uncorrected = 0
    for _ in range(1000):
        groups = {name: with_seeds([rng.gauss(2.0, 0.1) for _ in range(5)]) for name in "ABCD"}
        found = judge(groups)
        assert len(found) == 6
        wrong += any(each.shown for each in found)
        uncorrected += any(each.interval is not None and each.interval.p < ALPHA for each in found)
    assert wrong / 1000 <= 0.065 < 0.12 < uncorrected / 1000


def difference_of(p: float) -> GroupDifference:
    """One with that p-value, over 5 pairs."""
    return GroupDifference("A", "B", True, 5, 1.0, Interval.of(1.0, 1.0 / critical_t(p, 4), 4))


@pytest.mark.parametrize(
    "ps",
    [
        [0.01],
        [0.01, 0.02, 0.03],
        [0.04, 0.01, 0.02],
        [0.03, 0.026, 0.5, 0.001],
        [0.2, 0.04, 0.049],
        [0.026, 0.027, 0.028],
    ],
)
def test_the_correction_is_holms_and_the_intervals_say_the_same(ps: list[float]) -> None:
    for order in permutations(ps):
        found = holm([difference_of(p) for p in order])
        ranked = sorted(order)
        for p, each in zip(order, found):
            below = ranked[: ranked.index(p) + 1]
            corrected = max(min(1.0, (len(ps) - number) * other) for number, other in enumerate(below))
            assert each.p_holm == pytest.approx(corrected, rel=1e-9)
            assert each.shown == (corrected < ALPHA)
            assert each.low is not None and each.high is not None
            assert each.shown == (not each.low <= 0 <= each.high)


def test_a_difference_that_cannot_be_judged_counts_for_no_correction() -> None:
    one_seed = difference(("A", with_seeds([1.0])), ("B", with_seeds([2.0])))
    same = difference(("A", with_seeds([1.0, 1.0])), ("B", with_seeds([2.0, 2.0])))
    found = holm([one_seed, difference_of(0.04), same])
    assert found[0].verdict == "cannot be judged: one seed" and found[0].p_holm is None
    assert found[1].verdict == "B is better" and found[1].p_holm == pytest.approx(0.04)
    assert found[2].verdict == "cannot be judged: its seeds change nothing"
    assert holm([difference_of(0.3)])[0].verdict == "no difference shown"


def test_few_seeds_are_called_few() -> None:
    groups = {name: with_seeds([1.0, 1.1, 1.2]) for name in "AB"}
    assert "3 seeds are few" in str(remark_on_seeds(judge(groups)))
    assert "one seed says nothing" in str(remark_on_seeds(judge({name: with_seeds([1.0]) for name in "AB"})))
    assert remark_on_seeds(judge({name: with_seeds([1.0, 1.1, 1.2, 1.3, 1.4]) for name in "AB"})) is None
    assert mean_interval([1.0]) is None


def test_with_a_baseline_each_group_is_compared_with_that_one_only() -> None:
    rng = random.Random(2)
    groups = {name: with_seeds([rng.gauss(2.0, 0.1) for _ in range(5)]) for name in "ABC"}
    assert [(each.first, each.second) for each in judge(groups)] == [("A", "B"), ("A", "C"), ("B", "C")]
    assert [(each.first, each.second) for each in judge(groups, "B")] == [("A", "B"), ("C", "B")]
