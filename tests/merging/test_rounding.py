"""The numbers: one rounding to nearest even, the product added exactly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qlora_hal.export.rounding import is_finite, rounded
from qlora_hal.export.weights import add_product

EVERY_UPPER_HALF = np.arange(2**16, dtype=np.uint32) << 16
LOWER_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("lower", LOWER_HALVES)
def test_rounding_is_torchs_for_every_exponent_and_tie(dtype: str, lower: int) -> None:
    values = (EVERY_UPPER_HALF | np.uint32(lower)).view(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, dtype))
    ours = torch.from_numpy(rounded(values, dtype).view(np.int16)).view(expected.dtype)
    numbers = ~expected.isnan()
    assert torch.equal(ours[numbers], expected[numbers])
    assert bool(ours[~numbers].isnan().all())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_seen_after_rounding(dtype: str, bad: float) -> None:
    values = np.ones((3, 4), np.float32)
    assert is_finite(rounded(values, dtype), dtype)
    values[1, 2] = bad
    assert not is_finite(rounded(values, dtype), dtype)


def test_float16_overflow_is_seen() -> None:
    assert not is_finite(rounded(np.array([[65520.0]], np.float32), "float16"), "float16")
    assert is_finite(rounded(np.array([[65504.0]], np.float32), "float16"), "float16")


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 40), st.integers(1, 40), st.floats(0.01, 64.0))
def test_merged_weight_is_within_one_rounding_of_the_sum(
    seed: int, r: int, rows: int, columns: int, scale: float
) -> None:
    draw = np.random.default_rng(seed)
    weight, a, b = (
        draw.standard_normal(shape, dtype=np.float32) for shape in ((rows, columns), (r, columns), (rows, r))
    )
    product = scale * (b.astype(np.float64) @ a.astype(np.float64))
    exact = weight.astype(np.float64) + product
    add_product(weight, a, b, scale)
    # Two float32 roundings: of the product and of the sum; float64's own are 2^29 times smaller.
    bound = 2.0**-24 * (np.abs(product) + np.abs(exact)) * (1 + 1e-6)
    assert (np.abs(weight - exact) <= bound).all()
