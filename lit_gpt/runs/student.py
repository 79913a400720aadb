"""Student's t distribution: tails and quantiles to the accuracy of a double, in the standard library alone."""

from __future__ import annotations

import functools
import math

_TINY = 1e-300
_MOST_TERMS = 100_000
_MOST_STEPS = 10_000


def two_sided_p(t: float, df: float) -> float:
    """P(|T| ≥ |t|) for T with `df` degrees of freedom, which need not be whole: I_x(df/2, 1/2), x = df / (df + t²)."""
    if math.isinf(t):
        return 0.0
    square = t * t
    return _incomplete_beta(df / 2, 0.5, df / (df + square), square / (df + square))


@functools.cache
def critical_t(alpha: float, df: float) -> float:
    """The t ≥ 0 for which P(|T| ≥ t) = `alpha`, 0 < `alpha` ≤ 1: of an interval of confidence 1 - `alpha`.

    By Newton's method from 0: the tail is a convex function of t ≥ 0, so that no step passes the solution.
    """
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    t = 0.0
    for _ in range(_MOST_STEPS):
        density = scale * (1 + t * t / df) ** (-(df + 1) / 2)
        step = (two_sided_p(t, df) - alpha) / (2 * density)
        if step <= 1e-15 * t:  # no further, or back by a rounding error
            break
        t += step
    return t


def _incomplete_beta(a: float, b: float, x: float, y: float) -> float:
    """The regularised incomplete beta function I_x(a, b); `y` is 1 - x, given apart so that none is rounded away."""
    if x <= 0 or y <= 0:
        return 0.0 if x <= 0 else 1.0
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1.0 - _incomplete_beta(b, a, y, x)
    logarithm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log(y)
    return math.exp(logarithm) * _beta_fraction(a, b, x) / a


def _beta_fraction(a: float, b: float, x: float) -> float:
    """The continued fraction 1/(1 + d₁/(1 + d₂/(1 + …))) of I_x(a, b), by the modified method of Lentz.

    https://dlmf.nist.gov/8.17.E22
    """
    value, c, d = 1.0, 1 / _TINY, 1.0
    for term in range(1, _MOST_TERMS):
        m = term // 2
        if term % 2:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / _not_zero(1.0 + numerator * d)
        c = _not_zero(1.0 + numerator / c)
        value *= c * d
        if abs(c * d - 1.0) < 1e-16:
            break
    return value


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
