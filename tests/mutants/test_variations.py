"""Honest backends that sum in another order pass: the suite judges what is computed, not how."""

from __future__ import annotations

import numpy as np
import pytest

from qlora_hal_conformance.mutants.run_mutants import first_failure
from qlora_hal_conformance.mutants.variations import (
    VARIATIONS,
    autocast,
    summed_by_blas,
    summed_from_the_end,
    summed_in_chunks,
    transposed,
)

SEED = 20261129
NAMES = [variation.name for variation in VARIATIONS]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_honest_variation_passes_the_whole_suite(name: str) -> None:
    assert first_failure(f"qlora_hal_conformance.mutants.specs:{name}", seed=SEED) is None


@pytest.mark.parametrize("name", ["honest_in_chunks", "honest_autocast"])
def test_honest_variation_goes_on_as_the_oracle_does(name: str) -> None:
    assert first_failure(f"qlora_hal_conformance.mutants.specs:{name}", ("52",), seed=SEED) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arithmetic_of", [summed_in_chunks, summed_from_the_end, summed_by_blas, transposed, autocast])
def test_product_is_the_product_but_not_bit_for_bit(arithmetic_of: object, dtype: str) -> None:
    """Over 100 terms no order of float32 sums gives float64's; each is within 100 roundings of it."""
    assert callable(arithmetic_of)
    random = np.random.default_rng(SEED)
    left, right = random.normal(size=(2, 3, 5, 100)), random.normal(size=(2, 1, 100, 7))
    kept = dtype == "bfloat16" and arithmetic_of is autocast
    roundoff = 2.0**-8 if kept else 2.0**-24
    found = arithmetic_of(dtype).product("a product", left, right)
    distance = np.abs(found - left @ right)
    assert distance.max() > 0.0
    assert (distance <= 102 * roundoff * (np.abs(left) @ np.abs(right))).all()
