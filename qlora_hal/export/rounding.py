"""Float32 weights as the output's dtype, each rounded once to nearest, ties to even; and what that rounding is.

Unit roundoff u of a format with p bits of precision is 2^-p (Higham 2002, section 2.1): a value moves by at most u of
itself.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from qlora_hal.contract.values import Float32

UNIT_ROUNDOFF: Mapping[str, float] = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
SAFETENSORS_DTYPE: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

Stored = npt.NDArray[np.float32] | npt.NDArray[np.float16] | npt.NDArray[np.uint16]


def rounded(values: Float32, dtype: str) -> Stored:
    """`values` as stored, of the same shape; bfloat16 as the 16 bits of each number. Overflow becomes infinity."""
    if dtype == "float32":
        return values.astype("<f4", copy=False)
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype("<f2")
    bits = values.astype("<f4", copy=False).view(np.uint32)
    # Half a unit of the last kept bit, less one where that bit is 0: ties go to even. NaN stays NaN.
    ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = ((bits + ties_to_even) >> np.uint32(16)).astype("<u2")
    return np.where(np.isnan(values), np.uint16(0x7FC0), kept).astype("<u2", copy=False)


def is_finite(stored: Stored, dtype: str) -> bool:
    """Whether no stored value is NaN or infinity."""
    if dtype == "bfloat16":
        exponent = np.uint16(0x7F80)
        return not bool(((stored.view(np.uint16) & exponent) == exponent).any())
    return bool(np.isfinite(stored).all())
