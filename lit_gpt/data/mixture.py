"""Mixtures of folders by weight: the folder of each sample of an endless stream, a pure function of its position.

After any number n of samples a folder of weight w has given more than w·n - 1 and less than w·n + 1 of them, whatever
the other weights are. With exact shares the order repeats after as many samples as their common denominator; one such
period is a schedule of unit jobs with release times and deadlines, which the earliest deadline first always meets
(Tijdeman 1980, "The chairman assignment problem"; Steiner and Yeomans 1993, "Level schedules for mixed-model,
just-in-time processes").
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from heapq import heappop, heappush

import numpy as np
import numpy.typing as npt

from lit_gpt.errors import UserError

MAX_PERIOD = 1 << 16
"""Samples after which the order repeats, at most: it is computed once and held in memory."""
Ints = npt.NDArray[np.int64]


class Mixture:
    """Which folder the sample at each position is from, and which of that folder's samples it is.

    Attributes:
        names: of the folders, in order.
        shares: of each folder in every `period` samples; their sum is `period`.
        period: samples after which the order of the folders repeats.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        """Compute one period.

        Args:
            weights: folder → its weight. Those that the user wrote as decimal numbers are taken as such, exactly, and
                divided by their sum.

        Raises:
            UserError: no folder, a weight that is no positive number, or weights without a small common denominator.
        """
        if not weights:
            raise UserError("data.mixture has no folder: write {FOLDER: WEIGHT, …}, or leave it out")
        exact = {name: _exact_weight(name, weight) for name, weight in weights.items()}
        total = sum(exact.values())
        parts = [weight / total for weight in exact.values()]
        self.names = list(exact)
        self.period = math.lcm(*(part.denominator for part in parts))
        if self.period > MAX_PERIOD:
            rounded = ", ".join(f"{name}: {_rounded(part)}" for name, part in zip(self.names, parts))
            raise UserError(
                f"data.mixture: these weights come out even only after {self.period:,} samples, more than "
                f"{MAX_PERIOD:,}: give such as have fewer digits and a round sum, like {{{rounded}}}"
            )
        self.shares: Ints = np.array([int(part * self.period) for part in parts], np.int64)
        self._folders = _one_period(self.shares.tolist(), self.period)
        self._earlier = np.empty(self.period, np.int64)  # samples of the same folder before, in the period
        for folder, share in enumerate(self.shares):
            self._earlier[self._folders == folder] = np.arange(share)

    @property
    def ratio(self) -> str:
        """The shares of the folders, such as `7:3`."""
        return ":".join(map(str, self.shares.tolist()))

    def assign(self, position: int, count: int) -> tuple[Ints, Ints]:
        """The samples at `position` … `position + count`: number of the folder, and of the sample in it, (count,) each.

        A folder's own samples are counted from 0 on without an end.
        """
        periods, inside = np.divmod(np.arange(position, position + count), self.period)
        folders = self._folders[inside]
        return folders, periods * self.shares[folders] + self._earlier[inside]


def _exact_weight(name: str, weight: float) -> Fraction:
    """The decimal number that a float was written as. Raises UserError if it is not positive."""
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < weight < math.inf:
        raise UserError(f"data.mixture: {name} has weight {weight}: give a number above 0, or leave the folder out")
    return Fraction(repr(weight))


def _rounded(part: Fraction) -> float:
    """A share with three digits, but not 0."""
    return max(0.001, round(float(part), 3))


def _one_period(shares: list[int], period: int) -> Ints:
    """The folder (period,) of each sample of a period.

    The j-th sample of a folder, j = 1 …, cannot come before n = ⌊(j - 1) · period / share⌋ samples have, or the folder
    would be one or more ahead of its share; and comes before ⌈j · period / share⌉ have, or it would be one behind.
    """
    order = np.empty(period, np.int64)
    given = [0] * len(shares)
    waiting = [(0, folder) for folder in range(len(shares))]  # (the first position that its next sample may have, …)
    ready: list[tuple[int, int]] = []  # (the position that it comes before, folder)
    for position in range(period):
        while waiting and waiting[0][0] <= position:
            _, folder = heappop(waiting)
            heappush(ready, (-(-(given[folder] + 1) * period // shares[folder]), folder))
        deadline, folder = heappop(ready)
        assert position < deadline
        order[position] = folder
        given[folder] += 1
        if given[folder] < shares[folder]:
            heappush(waiting, (given[folder] * period // shares[folder], folder))
    return order
