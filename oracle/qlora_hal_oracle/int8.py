"""The 8-bit weights of LLM.int8(): one signed byte to a value, one float32 absmax to an output row.

bitsandbytes rounds the weight to float16 before it encodes (`nn.Int8Params._quantize`), so the bound against a
float32 original has a float16 term. Source: bitsandbytes 0.50.2, `backends/default/ops.py`, `int8_vectorwise_quant`;
arXiv:2208.07339.
"""

from __future__ import annotations

import numpy as np

from .arrays import AnyFloat, Float32, Float64, Int8

LARGEST_CODE = 127
_FLOAT32_ROUNDOFF = 2.0**-24
_FLOAT16_ROUNDOFF = 2.0**-11
_FLOAT16_HALF_SUBNORMAL = 2.0**-25


def quantize_int8_rows(weight: AnyFloat) -> tuple[Int8, Float32]:
    """(codes int8 [out, in], absmax float32 [out]) of a weight `[out, in]`, after rounding it to float16.

    code = round_half_even(w * (127 * (1 / absmax))) in float32: torch divides a number by a tensor through the
    reciprocal, and ties are common among float16 values, so the order of roundings decides codes. CUDA kernels may
    decide a tie the other way; the bound holds for both. An all-zero row has codes 0.
    """
    halves = np.asarray(weight).astype(np.float16).astype(np.float32)
    absmax = np.abs(halves).max(axis=1)
    reciprocal = np.float32(1.0) / np.where(absmax == 0.0, np.float32(1.0), absmax)
    factor = np.float32(LARGEST_CODE) * reciprocal
    return np.rint(halves * factor[:, None]).astype(np.int8), absmax.astype(np.float32)


def dequantize_int8_rows(codes: Int8, row_absmax: AnyFloat) -> Float64:
    """The stored weight, exactly: code * absmax / 127 in float64."""
    return codes.astype(np.float64) * np.asarray(row_absmax, dtype=np.float64).reshape(-1, 1) / LARGEST_CODE


def int8_error_bound(weight: AnyFloat, row_absmax: AnyFloat) -> Float64:
    """A bound for |weight - decoded weight| at every position.

    Half a step of the row, absmax / 254; the float16 rounding of w, 2**-11 |w| (2**-25 where w is subnormal in
    float16); and 4 u32 * absmax for the float32 steps that decide the rounding.
    """
    absmax = np.asarray(row_absmax, dtype=np.float64).reshape(-1, 1)
    halving = _FLOAT16_ROUNDOFF * np.abs(np.asarray(weight, dtype=np.float64)) + _FLOAT16_HALF_SUBNORMAL
    return absmax / (2 * LARGEST_CODE) + halving + 4.0 * _FLOAT32_ROUNDOFF * absmax
