"""Random rounding makes errors of the size it promises, and spreads and envelopes judge by them."""

from __future__ import annotations

import math

import numpy as np
import pytest

from qlora_hal_oracle import (
    EXACT,
    UNIT_ROUNDOFF,
    Arithmetic,
    ErrorScale,
    MagnitudeRecorder,
    RandomRounding,
    Spread,
    loss_curve_envelope,
    spread,
)
from qlora_hal_oracle.arrays import Float64

BFLOAT16, FLOAT32 = UNIT_ROUNDOFF["bfloat16"], UNIT_ROUNDOFF["float32"]


@pytest.fixture
def left() -> Float64:
    return np.random.default_rng(1).normal(size=(50, 256))


@pytest.fixture
def right() -> Float64:
    return np.random.default_rng(2).normal(size=(256, 40))


def test_a_stored_value_is_off_by_at_most_the_unit_roundoff_and_comes_close_to_it(left: Float64) -> None:
    relative = np.abs(RandomRounding(BFLOAT16, seed=1).store(left) / left - 1.0)
    assert 0.99 * BFLOAT16 < relative.max() <= BFLOAT16 * (1 + 1e-9)


def test_values_kept_wide_are_off_by_the_float32_roundoff_whatever_the_compute_dtype(left: Float64) -> None:
    relative = np.abs(RandomRounding(BFLOAT16, seed=1).store_wide(left) / left - 1.0)
    assert 0.99 * FLOAT32 < relative.max() <= FLOAT32 * (1 + 1e-6)


def test_a_real_float32_product_errs_less_than_the_random_one_but_not_by_orders(left: Float64, right: Float64) -> None:
    left, right = left.astype(np.float32).astype(np.float64), right.astype(np.float32).astype(np.float64)
    exact = left @ right
    random = np.abs(RandomRounding(FLOAT32, seed=1).product("p", left, right) - exact)
    real = np.abs(sequential_float32_product(left, right) - exact)
    rms = math.sqrt((real**2).mean()) / math.sqrt((random**2).mean())
    # A running sum of k random terms makes errors of about sqrt(k/6) u times their root sum of squares; the uniform
    # random error has sqrt(k/3) u: the ratio is near 1/sqrt(2) (the rounding of each product adds little).
    assert 0.4 < rms < 1.0


def sequential_float32_product(left: Float64, right: Float64) -> Float64:
    total = np.zeros((left.shape[0], right.shape[1]), dtype=np.float32)
    for k in range(left.shape[1]):
        total += left[:, k : k + 1].astype(np.float32) * right[k].astype(np.float32)
    return total.astype(np.float64)


def test_equal_seeds_give_equal_roundings_and_other_seeds_others(left: Float64, right: Float64) -> None:
    first, again, other = (RandomRounding(FLOAT32, seed=s).product("p", left, right) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_recorder_computes_exactly_and_notes_the_magnitude_of_each_product(left: Float64, right: Float64) -> None:
    recorder = MagnitudeRecorder()
    assert np.array_equal(recorder.product("model.layers.0.mlp.down_proj", left, right), left @ right)
    recorder.product("later", right.T, left.T)
    magnitude = (np.abs(left) @ np.abs(right)).max()
    first, later = recorder.scales["model.layers.0.mlp.down_proj"], recorder.scales["later"]
    assert (first.magnitude, first.reduction_length, first.depth) == (magnitude, 256, 1)
    assert (later.reduction_length, later.depth) == (256, 2)


def test_the_bound_is_the_written_formula() -> None:
    scale = ErrorScale(magnitude=3.0, reduction_length=100, depth=4)
    assert scale.bound(FLOAT32, constant=8.0) == pytest.approx(8.0 * 2.0 * FLOAT32 * (1 + 10) * 3.0)
    assert scale.bound(BFLOAT16, constant=8.0) == pytest.approx(8.0 * 2.0 * (BFLOAT16 + 10 * FLOAT32) * 3.0)


def test_a_spread_allows_other_roundings_of_the_same_computation_and_nothing_much_larger(
    left: Float64, right: Float64
) -> None:
    def measure(arithmetic: Arithmetic) -> dict[str, Float64]:
        return {"y": arithmetic.store(arithmetic.product("p", left, right))}

    allowed = spread(measure, unit_roundoff=BFLOAT16, runs=8)["y"]
    another_run = measure(RandomRounding(BFLOAT16, seed=99))["y"]
    assert allowed.allows(another_run, widening=3.0)
    assert not allowed.allows(allowed.exact * 1.05, widening=3.0)
    assert allowed.excess(measure(EXACT)["y"], widening=3.0) == 0.0


def test_nan_and_any_deviation_from_what_cannot_deviate_are_outside() -> None:
    allowed = Spread(exact=np.array([1.0, 2.0]), deviation=np.array([0.1, 0.0]))
    assert allowed.allows(np.array([1.2, 2.0]), widening=3.0)
    assert not allowed.allows(np.array([np.nan, 2.0]), widening=3.0)
    assert not allowed.allows(np.array([1.0, 2.0 + 1e-12]), widening=3.0)
    assert not allowed.allows(np.array([np.inf, 2.0]), widening=3.0)


def test_an_envelope_never_narrows_along_the_steps() -> None:
    def losses(arithmetic: Arithmetic) -> list[float]:
        # The deviations of these steps are proportional to their values: large, small, large.
        return [float(arithmetic.store(np.array([value]))[0]) for value in (1.0, 1e-3, 2.0)]

    envelope = loss_curve_envelope(losses, unit_roundoff=BFLOAT16, runs=20)
    assert envelope.deviation[1] == envelope.deviation[0] > 0.5 * BFLOAT16
    assert envelope.deviation[2] > envelope.deviation[1]
    assert envelope.excess([1.0, 1e-3, 2.0]) == 0.0
    assert envelope.excess([1.0, 1e-3, 2.1]) > 1.0
