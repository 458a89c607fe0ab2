"""Unit roundoffs of the compute dtypes, and rounding to bfloat16, which NumPy lacks."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from .arrays import AnyFloat, Float32

# Half the distance from 1 to the next number: 2**-p for p significant bits (24, 11 and 8, the hidden one included).
UNIT_ROUNDOFF = MappingProxyType({"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8})


def round_to_bfloat16(values: AnyFloat) -> Float32:
    """The nearest bfloat16 of each finite value (ties to even), held as float32.

    bfloat16 is the upper half of a float32: adding 0x7FFF plus the lowest kept bit, then clearing the lower half,
    rounds to nearest even. Do not give NaN: the carry could make it an infinity.
    """
    pattern = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    lowest_kept_bit = (pattern >> np.uint32(16)) & np.uint32(1)
    rounded = pattern + np.uint32(0x7FFF) + lowest_kept_bit
    return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
