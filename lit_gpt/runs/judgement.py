"""The judgement of a comparison: differences between groups of runs, with t-intervals over seeds, corrected by Holm.

A difference that one seed shows may be gone with the next: what counts is how much seeds differ among themselves. Where
two groups have the same seeds, the differences of each seed are taken (a paired t-interval), else Welch's interval for
two groups of unequal variance. Of several comparisons some would show a difference by chance: their p-values are
corrected as S. Holm has it (A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics
6, 1979), which bounds the chance of even one false difference, whatever the comparisons have to do with each other.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from lit_gpt.runs.student import critical_t, two_sided_p

ALPHA = 0.05
FEW_SEEDS = 5
"""Below so many the interval rests on an assumption that so few numbers cannot check."""

Seed = tuple[str, ...]


@dataclass(frozen=True)
class Interval:
    """A mean with its t-interval.

    Attributes:
        mean: of the values, or of a difference.
        error: the standard error of the mean.
        df: degrees of freedom.
        low: the lower end at 95 %.
        high: the upper end.
    """

    mean: float
    error: float
    df: float
    low: float
    high: float

    @classmethod
    def of(cls, mean: float, error: float, df: float) -> Interval:
        """The interval at 95 %."""
        half = critical_t(ALPHA, df) * error
        return cls(mean, error, df, mean - half, mean + half)

    @property
    def p(self) -> float:
        """The two-sided p-value of a mean of 0."""
        return two_sided_p(self.mean / self.error, self.df)

    def at(self, alpha: float) -> tuple[float, float]:
        """Both ends at a confidence of 1 - `alpha`."""
        half = critical_t(alpha, self.df) * self.error
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class GroupDifference:
    """The difference between two groups of runs, the first less the second.

    Attributes:
        first: name of a group.
        second: name of another.
        paired: whether it is over pairs of runs that have the same seeds.
        seeds: how many seeds it rests on: pairs, or the smaller group.
        mean: the difference of the means.
        interval: None where it cannot be told: with one seed, or seeds that change nothing.
        p_holm: the p-value, corrected for the number of comparisons.
        low: the lower end of the interval at the level that the comparison is judged at after the correction.
        high: the upper end; 0 is outside exactly where a difference is shown.
        windows: the spread over windows of the text: a t-interval for these very runs on other text of this kind.
    """

    first: str
    second: str
    paired: bool
    seeds: int
    mean: float
    interval: Interval | None
    p_holm: float | None = None
    low: float | None = None
    high: float | None = None
    windows: Interval | None = None

    @property
    def shown(self) -> bool:
        """Whether a difference is shown, after the correction."""
        return self.p_holm is not None and self.p_holm < ALPHA

    @property
    def verdict(self) -> str:
        """The judgement in words. Lower is better, of losses and of bits per byte."""
        if self.interval is None:
            return "cannot be judged: one seed" if self.seeds < 2 else "cannot be judged: its seeds change nothing"
        if not self.shown:
            return "no difference shown"
        return f"{self.first} is better" if self.mean < 0 else f"{self.second} is better"

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        found, windows = self.interval, self.windows
        return {
            "first": self.first,
            "second": self.second,
            "difference": self.mean,
            "paired": self.paired,
            "seeds": self.seeds,
            "interval_95": None if found is None else [found.low, found.high],
            "p": None if found is None else found.p,
            "p_holm": self.p_holm,
            "interval_holm": None if self.low is None else [self.low, self.high],
            "windows_95": None if windows is None else [windows.low, windows.high],
            "verdict": self.verdict,
        }


def mean_interval(values: Sequence[float]) -> Interval | None:
    """The t-interval of a mean; None where the values are fewer than two, or all the same."""
    if len(values) < 2:
        return None
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Interval.of(statistics.fmean(values), error, len(values) - 1) if error > 0 else None


def welch_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Welch's t-interval of the difference of two means; None where a group has fewer than two, or nothing varies."""
    if min(len(first), len(second)) < 2:
        return None
    one, other = statistics.variance(first) / len(first), statistics.variance(second) / len(second)
    if one + other == 0:
        return None
    df = (one + other) ** 2 / (one**2 / (len(first) - 1) + other**2 / (len(second) - 1))
    return Interval.of(statistics.fmean(first) - statistics.fmean(second), math.sqrt(one + other), df)


def difference(
    first: tuple[str, Sequence[tuple[Seed, float]]], second: tuple[str, Sequence[tuple[Seed, float]]]
) -> GroupDifference:
    """The difference of two groups, each a name and the figure of each run with its seed; not corrected yet."""
    (name, runs), (other_name, others) = first, second
    by_seed, others_by_seed = dict(runs), dict(others)
    are_single = len(by_seed) == len(runs) and len(others_by_seed) == len(others)
    paired = are_single and by_seed.keys() == others_by_seed.keys()
    values, other_values = [value for _, value in runs], [value for _, value in others]
    if paired:
        interval = mean_interval([value - others_by_seed[seed] for seed, value in by_seed.items()])
    else:
        interval = welch_interval(values, other_values)
    mean = statistics.fmean(values) - statistics.fmean(other_values)
    return GroupDifference(name, other_name, paired, min(len(runs), len(others)), mean, interval)


def holm(differences: Sequence[GroupDifference]) -> list[GroupDifference]:
    """The same, corrected for their number, in the same order; those that cannot be judged do not count.

    Of m p-values the i-th smallest is judged at α / (m - i + 1), as long as all smaller ones were below their levels;
    the intervals of those that follow have the level at which this ended. So an interval leaves 0 out exactly where a
    difference is shown.
    """
    judged = [(found.interval, number) for number, found in enumerate(differences) if found.interval is not None]
    judged.sort(key=lambda item: item[0].p)
    corrected, largest, level = list(differences), 0.0, ALPHA
    for rank, (interval, number) in enumerate(judged):
        if largest < ALPHA:
            level = ALPHA / (len(judged) - rank)
        largest = max(largest, min(1.0, interval.p * (len(judged) - rank)))
        low, high = interval.at(level)
        corrected[number] = replace(differences[number], p_holm=largest, low=low, high=high)
    return corrected


def judge(groups: Mapping[str, Sequence[tuple[Seed, float]]], baseline: str | None = None) -> list[GroupDifference]:
    """All differences between groups, or those from `baseline`, corrected for their number.

    Args:
        groups: name → the figure of each run, with its seed.
        baseline: the name of the group that the others are compared with; None for each with each.
    """
    if baseline is None:
        pairs = list(combinations(groups, 2))
    else:
        pairs = [(name, baseline) for name in groups if name != baseline]
    return holm([difference((one, groups[one]), (other, groups[other])) for one, other in pairs])


def remark_on_seeds(differences: Sequence[GroupDifference]) -> str | None:
    """How little few seeds say; None where there are enough."""
    fewest = min((found.seeds for found in differences), default=FEW_SEEDS)
    if fewest >= FEW_SEEDS:
        return None
    if fewest < 2:
        return "one seed says nothing about the next: train each configuration with five seeds or more"
    return (
        f"{fewest} seeds are few: the intervals are wide, and right only if losses are normally distributed over "
        f"seeds, which so few cannot show; train with {FEW_SEEDS} or more"
    )
