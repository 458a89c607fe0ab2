"""Student's t and Fisher's F against printed tables, and chances against draws."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal_conformance.convergence.distributions import (
    chance_inside,
    chance_told_apart,
    fisher_below,
    fisher_quantile,
    student_below,
    student_quantile,
)


@pytest.mark.parametrize(
    ("probability", "freedom", "t"),
    [(0.975, 1, 12.7062), (0.975, 7, 2.3646), (0.995, 7, 3.4995), (0.975, 38, 2.0244), (0.95, 120, 1.6577)],
)
def test_student_is_that_of_the_tables(probability: float, freedom: int, t: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(t, abs=6e-5)
    assert student_below(-t, freedom) == pytest.approx(1.0 - probability, abs=1e-5)


@pytest.mark.parametrize(
    ("probability", "upper", "lower", "f"),
    [(0.975, 19, 19, 2.5265), (0.95, 7, 19, 2.5435), (0.95, 1, 1, 161.4476), (0.99, 5, 10, 5.6363)],
)
def test_fisher_is_that_of_the_tables(probability: float, upper: int, lower: int, f: float) -> None:
    assert fisher_quantile(probability, upper, lower) == pytest.approx(f, rel=1e-4)
    assert fisher_below(1.0 / f, lower, upper) == pytest.approx(1.0 - probability, abs=1e-5)


@pytest.mark.parametrize(("shift", "deviation"), [(0.2, 0.3), (0.0, 0.3), (0.64, 0.1)])
def test_chance_of_an_interval_inside_is_what_draws_give(shift: float, deviation: float) -> None:
    draws = np.random.default_rng(1).normal(shift, deviation, (20_000, 8))
    half = student_quantile(0.995, 7) * draws.std(axis=1, ddof=1) / 8**0.5
    inside = float((np.abs(draws.mean(axis=1)) + half < 0.64).mean())
    assert chance_inside(shift, deviation, 8, 0.64, 0.99) == pytest.approx(inside, abs=0.015)


def test_chance_of_a_significant_difference_is_what_draws_give() -> None:
    random = np.random.default_rng(2)
    one, other = random.normal(1.5, 1.0, (20_000, 8)), random.normal(0.0, 1.0, (20_000, 20))
    pooled = np.sqrt((7 * one.var(axis=1, ddof=1) + 19 * other.var(axis=1, ddof=1)) / 26)
    t = (one.mean(axis=1) - other.mean(axis=1)) / (pooled * (1 / 8 + 1 / 20) ** 0.5)
    seen = float((np.abs(t) > student_quantile(0.9975, 26)).mean())
    assert chance_told_apart(1.5, 1.0, 8, 20, 0.995) == pytest.approx(seen, abs=0.015)
