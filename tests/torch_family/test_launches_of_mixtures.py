"""What a fused mixture asks a device for, counted as `benchmarks/moe_launches.py` counts it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.parametrize("recompute", [None, "full"])
def test_nothing_is_asked_for_once_an_expert(recompute: str | None) -> None:
    from moe_launches import counts_of

    few, many = (counts_of(1, "all", recompute, fused=True, number=number) for number in (4, 16))
    assert few == many
    assert few["_grouped_mm"] == (12 if recompute is None else 15)
    assert not few["cat"], "nothing is joined in a step"
