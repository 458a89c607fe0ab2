"""Products with a frozen weight in 8-bit floats (E4M3), each operand with one scale to a row.

A row v of an operand is held as s e: s = max|v| / 448 in float32 (1 for a row of zeros), e = v / s rounded to the
nearest E4M3 number, ties to even, nothing beyond 448 (Micikevicius et al. 2022, "FP8 formats for deep learning").
Forward, the rows are those of the input and of the weight. Back through y = x (s E)^T, the weight's scales belong to
the sum: the gradient's columns are multiplied by s, then its rows rounded, and the sum is with the same E.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arrays import Float64

LARGEST = 448.0
_LEAST_EXPONENT, _MANTISSA_BITS = -6, 3


def to_e4m3(values: Float64) -> Float64:
    """The nearest E4M3 number of each, ties to even; beyond the largest, it."""
    size = np.minimum(np.abs(values), LARGEST)
    exponents = np.maximum(np.frexp(size)[1] - 1, _LEAST_EXPONENT)  # 2^-6 begins the normal numbers
    step = np.ldexp(1.0, exponents - _MANTISSA_BITS)
    rounded: Float64 = np.copysign(np.rint(size / step) * step, values)
    return rounded


@dataclass(frozen=True, slots=True, eq=False)
class RowScaled:
    """`elements` of E4M3 `[rows, columns]`; `scales` `[rows, 1]`."""

    elements: Float64
    scales: Float64

    @property
    def values(self) -> Float64:
        """What is held."""
        return self.elements * self.scales


def row_scales(values: Float64) -> Float64:
    """max|row| / 448 `[..., 1]`, of float32 numbers; 1 for a row of zeros."""
    largest = np.abs(values).max(axis=-1, keepdims=True, initial=0.0).astype(np.float32)
    scales = (largest / np.float32(LARGEST)).astype(np.float64)
    return np.where(scales > 0.0, scales, 1.0)


def row_scaled(values: Float64) -> RowScaled:
    """Each row by its scale. The quotient is one of float32 numbers, as where it is computed."""
    scales = row_scales(values)
    quotients = values.astype(np.float32) / scales.astype(np.float32)
    return RowScaled(to_e4m3(quotients.astype(np.float64)), scales)


@dataclass(frozen=True, slots=True)
class Fp8Products:
    """Which operands are rounded: all of them; or some, to see what each does to a result."""

    weights: bool = True
    inputs: bool = True
    gradients: bool = True

    def of_weight(self, module: str, weight: Float64) -> RowScaled:
        """A frozen weight `[out, in]`, once for both directions."""
        return row_scaled(weight) if self.weights else RowScaled(weight, np.ones((weight.shape[0], 1)))

    def of_input(self, x: Float64) -> Float64:
        """What is multiplied with the weight for an input `[..., in]`."""
        return row_scaled(x).values if self.inputs else x

    def of_gradient(self, grad: Float64, scales: Float64) -> Float64:
        """What is multiplied with the weight's elements for an output's gradient `[..., out]`; `scales` are those of
        the weight's rows, `[out, 1]`."""
        columns = grad * scales[:, 0]
        return row_scaled(columns).values if self.gradients else columns
