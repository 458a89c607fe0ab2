"""Student's t and Fisher's F, and what a mean and a standard deviation of few normal numbers do. NumPy alone.

Both distributions are the regularized incomplete beta function, here by its continued fraction (Press et al., Numerical
Recipes, section 6.4; Lentz's method).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np

_SMALLEST = 1e-300
_TERMS = 400
_HALVINGS = 200
_POINTS = 4001
"""Places at which the density of a sample's standard deviation is summed; it is smooth, so few suffice."""


def regularized_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) for 0 <= x <= 1."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1.0) / (a + b + 2.0):
        # The fraction converges fast below the mean only.
        return 1.0 - regularized_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    numerator, denominator = 1.0, 1.0 / _off_zero(1.0 - (a + b) * x / (a + 1.0))
    found = denominator
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        before = found
        for term in (even, odd):
            denominator = 1.0 / _off_zero(1.0 + term * denominator)
            numerator = _off_zero(1.0 + term / numerator)
            found *= denominator * numerator
        if abs(found - before) < 1e-15 * abs(found):
            break
    return math.exp(log_front) * found / a


def _off_zero(value: float) -> float:
    return value if abs(value) > _SMALLEST else _SMALLEST


def student_below(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t."""
    tail = 0.5 * regularized_beta(freedom / 2.0, 0.5, freedom / (freedom + t * t))
    return tail if t < 0.0 else 1.0 - tail


@cache
def student_quantile(probability: float, freedom: int) -> float:
    """t with P(T <= t) = probability, for a probability of at least one half."""
    return _where(lambda t: student_below(t, freedom), probability)


def fisher_below(f: float, upper: int, lower: int) -> float:
    """P(F <= f) of Fisher's F with `upper` and `lower` degrees of freedom."""
    return regularized_beta(upper / 2.0, lower / 2.0, upper * f / (upper * f + lower)) if f > 0.0 else 0.0


@cache
def fisher_quantile(probability: float, upper: int, lower: int) -> float:
    """f with P(F <= f) = probability."""
    return _where(lambda f: fisher_below(f, upper, lower), probability)


def _where(below: Callable[[float], float], probability: float) -> float:
    """The place >= 0 where an increasing function reaches a probability."""
    low, high = 0.0, 1.0
    while below(high) < probability:
        high *= 2.0
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if below(middle) < probability else (low, middle)
    return 0.5 * (low + high)


def chance_inside(shift: float, deviation: float, runs: int, margin: float, confidence: float) -> float:
    """How often the two-sided interval for the mean of `runs` normal numbers lies inside +-`margin`.

    The numbers have the mean `shift` and the standard deviation `deviation`; the interval is Student's, of this
    confidence. P = E_s[Phi((margin - t s / sqrt(n) - shift) / e) - Phi((t s / sqrt(n) - margin - shift) / e)] with
    e = deviation / sqrt(n), over the distribution of the sample's own standard deviation s.
    """
    t, error = student_quantile(0.5 + confidence / 2.0, runs - 1), deviation / math.sqrt(runs)

    def inside(ratio: float) -> float:
        half = t * ratio * error
        if half >= margin:
            return 0.0
        return normal_below((margin - half - shift) / error) - normal_below((half - margin - shift) / error)

    return over_sample_deviation(inside, runs - 1)


def chance_told_apart(shift: float, deviation: float, runs: int, others: int, confidence: float) -> float:
    """How often the two-sided two-sample test of Student calls a true `shift` of the mean significant, for two normal
    samples of one standard deviation."""
    freedom = runs + others - 2
    t, error = student_quantile(0.5 + confidence / 2.0, freedom), deviation * math.sqrt(1.0 / runs + 1.0 / others)
    return over_sample_deviation(
        lambda ratio: normal_below(-t * ratio - shift / error) + 1.0 - normal_below(t * ratio - shift / error),
        freedom,
    )


def over_sample_deviation(function: Callable[[float], float], freedom: int) -> float:
    """The mean of a function of s / sigma, where freedom * (s / sigma)^2 is chi-squared."""
    ratios = np.linspace(1e-6, 1.0 + 8.0 / math.sqrt(freedom), _POINTS)
    log_density = (freedom - 1) * np.log(ratios) - freedom * ratios**2 / 2.0
    density = np.exp(log_density - log_density.max())
    values = np.array([function(float(ratio)) for ratio in ratios])
    return float((values * density).sum() / density.sum())


def normal_below(z: float) -> float:
    """Phi(z)."""
    return 0.5 * math.erfc(-z / math.sqrt(2.0))
