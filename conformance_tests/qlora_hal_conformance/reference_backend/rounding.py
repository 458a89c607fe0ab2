"""Float64 arithmetic whose every stored value is rounded to the compute dtype: what a device does, without the device.

Products accumulate in float64, so what differs from the oracle is the rounding of stored values alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from qlora_hal_oracle import round_to_bfloat16
from qlora_hal_oracle.arrays import Float64

Round = Callable[[Float64], Float64]


def to_float32(values: Float64) -> Float64:
    """The nearest float32, as float64."""
    return values.astype(np.float32).astype(np.float64)


def to_bfloat16(values: Float64) -> Float64:
    """The nearest bfloat16, as float64; NaN and infinity stay what they are."""
    finite = np.isfinite(values)
    rounded = round_to_bfloat16(np.where(finite, values, 0.0)).astype(np.float64)
    return np.where(finite, rounded, values)


def to_float16(values: Float64) -> Float64:
    """The nearest float16, as float64; beyond 65504 infinity."""
    return values.astype(np.float16).astype(np.float64)


class RoundedArithmetic:
    """Stored values in the compute dtype, what the contract keeps wide in float32."""

    def __init__(self, rounded: Round) -> None:
        self._round = rounded

    def product(self, name: str, left: Float64, right: Float64) -> Float64:
        return left @ right

    def store(self, values: Float64) -> Float64:
        return self._round(values)

    def store_wide(self, values: Float64) -> Float64:
        return to_float32(values)


ROUNDINGS: Mapping[str, Round] = {"float32": to_float32, "bfloat16": to_bfloat16, "float16": to_float16}
"""The most exact first: that is what `auto` takes here."""


def arithmetic_of(dtype: str) -> RoundedArithmetic:
    """The arithmetic of a compute dtype that this backend declares."""
    return RoundedArithmetic(ROUNDINGS[dtype])
